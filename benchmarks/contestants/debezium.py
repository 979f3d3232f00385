"""Debezium: its PostgreSQL source and its JDBC sink, in one Kafka Connect, through a broker like ours."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from benchmarks.backlog import Backlog, Receiver, until_true
from benchmarks.contestants.connect import CONNECT_VERSION, DEBEZIUM_VERSION, Connect
from benchmarks.contestants.debezium_settings import NAME, sink_config, sink_of, source_config, topic_of
from benchmarks.servers import Servers, active_walsender, execute
from live_migration.common.supervisor import ChildGuard

_JOIN_SECONDS = 120.0
_HAS_CAUGHT_UP = """
    select count(*) > 0 from pg_replication_slots s join pg_stat_replication r on r.pid = s.active_pid
    where slot_name = 'bench' and pg_current_wal_lsn() - sent_lsn < 65536"""


class Debezium:
    """One source connector, one sink connector a table, each with one task; `insert_mode` as of the JDBC sink.

    Tables have to be empty at first: nothing is copied.
    """

    needs_kafka = True

    def __init__(self, *, insert_mode: str = "upsert") -> None:
        self._insert_mode = insert_mode
        self.name = f"Debezium, {insert_mode}"

    def version(self, server: str) -> str:
        return f"Debezium {DEBEZIUM_VERSION} on Kafka Connect {CONNECT_VERSION} and PostgreSQL {server}"

    @asynccontextmanager
    async def replicate(self, servers: Servers, backlog: Backlog) -> AsyncIterator[Receiver]:
        assert servers.kafka is not None
        assert not backlog.initial
        await execute(servers.target_uri, backlog.schema)
        connectors = {"source": source_config(servers, backlog.tables)}
        for table in backlog.tables:
            connectors[sink_of(table)] = await sink_config(servers, table, self._insert_mode)
        client = AIOKafkaAdminClient(bootstrap_servers=servers.kafka.bootstrap)
        guard = await ChildGuard.open()
        try:
            await client.start()
            await client.create_topics([NewTopic(topic_of(table), 1, 1) for table in backlog.tables])
            connect = Connect(guard, servers.kafka, connectors)
            await connect.start()
            await _until_joined(client, connect, [f"connect-{sink_of(table)}" for table in backlog.tables])
            await until_true(servers.source_uri, _HAS_CAUGHT_UP, connect.check)
            yield _Pipeline(connect, servers)
        finally:
            await client.close()
            await guard.close()


class _Pipeline:
    """All runs; the JVM and its walsender stand still while the backlog is loaded."""

    def __init__(self, connect: Connect, servers: Servers) -> None:
        self._connect = connect
        self._servers = servers
        self._walsender = 0

    async def hold(self) -> None:
        """Stop the walsender too: it would go on decoding until the socket is full."""
        await until_true(self._servers.source_uri, _HAS_CAUGHT_UP, self._connect.check)
        self._walsender = await active_walsender(self._servers.source_uri, NAME)
        os.kill(self._walsender, signal.SIGSTOP)
        self._connect.signal(signal.SIGSTOP)

    async def arm(self) -> None:
        pass

    async def go(self) -> float:
        began = time.monotonic()
        os.kill(self._walsender, signal.SIGCONT)
        self._connect.signal(signal.SIGCONT)
        return began

    async def until_done(self, applied: str) -> float:
        return await until_true(self._servers.target_uri, applied, self._connect.check)

    async def settle(self, applied: str) -> None:
        pass

    def kind_of(self, process: psutil.Process) -> str | None:
        assert self._servers.kafka is not None
        return {self._servers.kafka.pid: "broker", self._connect.pid: "Kafka Connect"}.get(process.pid)


async def _until_joined(client: AIOKafkaAdminClient, connect: Connect, groups: list[str]) -> None:
    """Wait until the sinks have their partitions: what comes first must not wait for that."""
    async with asyncio.timeout(_JOIN_SECONDS):
        while not await _are_stable(client, groups):
            connect.check()
            await asyncio.sleep(0.2)


async def _are_stable(client: AIOKafkaAdminClient, groups: list[str]) -> bool:
    try:
        answers = await client.describe_consumer_groups(groups)
    except KafkaError:
        return False
    states = [state for answer in answers for _, _, state, *_ in answer.groups]
    return len(states) == len(groups) and set(states) == {"Stable"}
