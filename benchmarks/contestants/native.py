"""PostgreSQL's own logical replication: a subscription, disabled while the backlog is loaded."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil

from benchmarks.backlog import Backlog, Receiver, until_true
from benchmarks.servers import Servers, execute

_NAME = "bench"


class Native:
    """A subscription. `streaming` as in CREATE SUBSCRIPTION, for transactions above logical_decoding_work_mem (64 MB)."""

    needs_kafka = False

    def __init__(self, *, binary: bool, streaming: str = "off") -> None:
        self._binary = binary
        self._streaming = streaming
        self.name = f"native, {'binary' if binary else 'text'}"
        if streaming != "off":
            self.name += f", streaming {streaming}"

    def version(self, server: str) -> str:
        return f"PostgreSQL {server}"

    @asynccontextmanager
    async def replicate(self, servers: Servers, backlog: Backlog) -> AsyncIterator[Receiver]:
        await execute(servers.target_uri, backlog.schema)
        await execute(servers.source_uri, f"create publication {_NAME} for table {', '.join(backlog.tables)}")
        await execute(
            servers.target_uri,
            f"create subscription {_NAME} connection '{servers.source_uri}' publication {_NAME} "
            f"with (binary = {str(self._binary).lower()}, streaming = {self._streaming})",
        )
        await until_true(servers.target_uri, "select bool_and(srsubstate = 'r') from pg_subscription_rel")
        try:
            yield _Subscription(servers)
        finally:
            await execute(servers.target_uri, f"drop subscription {_NAME}")


class _Subscription:
    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    async def hold(self) -> None:
        await execute(self._servers.target_uri, f"alter subscription {_NAME} disable")
        await until_true(self._servers.source_uri, "select not bool_or(active) from pg_replication_slots")

    async def arm(self) -> None:
        pass

    async def go(self) -> float:
        began = time.monotonic()
        await execute(self._servers.target_uri, f"alter subscription {_NAME} enable")
        return began

    async def until_done(self, applied: str) -> float:
        return await until_true(self._servers.target_uri, applied)

    async def settle(self, applied: str) -> None:
        pass

    def kind_of(self, process: psutil.Process) -> str | None:
        return None
