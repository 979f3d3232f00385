"""This program: the whole way from slot to target, or one of its halves alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import asyncpg
import psutil

from benchmarks.backlog import Backlog, Receiver, until_true
from benchmarks.contestants.log_end import LogEnd
from benchmarks.contestants.processes import NAME, Program, program
from benchmarks.servers import Servers, active_walsender

_POSITION = "select pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
_LANES_TAKEN = "select coalesce(sum(epoch), 0)::bigint from _live_migration.checkpoints"


class Ours:
    """One producer and `consumers` consumers; `part` is what is measured: `whole`, `producer` or `consumer`."""

    needs_kafka = True

    def __init__(self, *, consumers: int = 1, part: str = "whole", options: dict[str, str] | None = None) -> None:
        self._consumers = consumers
        self._part = part
        self._options = options or {}
        self.name = "ours" if part == "whole" else f"ours, {part} alone"
        if consumers > 1:
            self.name += f", {consumers} consumers"

    def version(self, server: str) -> str:
        return f"live-migration {version('live-migration')} on PostgreSQL {server}"

    @asynccontextmanager
    async def replicate(self, servers: Servers, backlog: Backlog) -> AsyncIterator[Receiver]:
        async with program(servers, self._options) as running:
            running.start("coordinator")
            running.start("producer")
            for _ in range(self._consumers):
                running.start("consumer")
            await running.until_phase("replay")
            kind = {"whole": _Whole, "producer": _ProducerAlone, "consumer": _ConsumerAlone}[self._part]
            yield kind(running, servers)


class _Whole:
    """Both services run; the producer and its walsender stand still while the backlog is loaded."""

    def __init__(self, running: Program, servers: Servers) -> None:
        self._program = running
        self._servers = servers
        self._walsender = 0

    async def hold(self) -> None:
        """Stop the walsender too: it would go on decoding until the socket is full."""
        await self._settle_idle()
        self._walsender = await active_walsender(self._servers.source_uri, NAME)
        os.kill(self._walsender, signal.SIGSTOP)
        self._program.signal("producer", signal.SIGSTOP)

    async def arm(self) -> None:
        pass

    async def go(self) -> float:
        began = time.monotonic()
        self._let_producer_go()
        return began

    async def until_done(self, applied: str) -> float:
        return await until_true(self._servers.target_uri, applied, self._program.check)

    async def settle(self, applied: str) -> None:
        await until_true(self._servers.target_uri, applied, self._program.check)

    def kind_of(self, process: psutil.Process) -> str | None:
        return self._program.kind_of(process)

    def _let_producer_go(self) -> None:
        os.kill(self._walsender, signal.SIGCONT)
        self._program.signal("producer", signal.SIGCONT)

    async def _settle_idle(self) -> None:
        """Wait until the producer has caught up and has nothing in hand."""
        await until_true(
            self._servers.source_uri,
            "select count(*) > 0 from pg_replication_slots where active and pg_current_wal_lsn() - confirmed_flush_lsn < 65536",
            self._program.check,
        )


class _ProducerAlone(_Whole):
    """No consumer runs; done is when Kafka has committed the last change."""

    async def hold(self) -> None:
        await self._program.stop("consumer")
        await super().hold()

    async def arm(self) -> None:
        assert self._servers.kafka is not None
        self._end = await self._end_of_load()
        self._log = LogEnd(self._servers.kafka.bootstrap)
        await self._log.open()

    async def until_done(self, applied: str) -> float:
        try:
            return await self._log.until(self._end, self._program.check)
        finally:
            await self._log.close()

    async def settle(self, applied: str) -> None:
        self._program.start("consumer")
        await super().settle(applied)

    async def _end_of_load(self) -> int:
        """Give an LSN behind the last change; a message of its own transaction follows, so that the log passes it."""
        connection = await asyncpg.connect(self._servers.source_uri)
        try:
            end = int(await connection.fetchval(_POSITION))
            await connection.execute("select pg_logical_emit_message(true, 'bench', '')")
            return end
        finally:
            await connection.close()


class _ConsumerAlone(_ProducerAlone):
    """The log is in Kafka, the producer stands still; it counts from the moment at which a new consumer holds its lanes."""

    async def arm(self) -> None:
        await super().arm()
        self._let_producer_go()
        await super().until_done("")
        await _Whole.hold(self)
        connection = await asyncpg.connect(self._servers.target_uri)
        before = await connection.fetchval(_LANES_TAKEN)
        await connection.close()
        self._program.start("consumer")
        is_taken = f"select ({_LANES_TAKEN}) > {before}"
        await until_true(self._servers.target_uri, is_taken, self._program.check, poll_seconds=0.003)
        self._program.signal("consumer", signal.SIGSTOP)

    async def go(self) -> float:
        began = time.monotonic()
        self._program.signal("consumer", signal.SIGCONT)
        return began

    async def until_done(self, applied: str) -> float:
        return await _Whole.until_done(self, applied)

    async def settle(self, applied: str) -> None:
        self._let_producer_go()
        await _Whole.settle(self, applied)
