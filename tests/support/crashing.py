"""A server of the test's own that is stopped, started and made to crash."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg

from live_migration.common.errors import LiveMigrationError
from live_migration.common.local_postgres import LocalPostgres, postgres_binaries
from tests.fixtures.fix_postgres import SETTINGS

LOST = (asyncpg.PostgresError, asyncpg.InterfaceError, LiveMigrationError, OSError)
"""What a session meets while its server goes or comes."""


@asynccontextmanager
async def kept_server(version: int) -> AsyncIterator[LocalPostgres]:
    """Give a server whose folder stays when it is stopped."""
    with tempfile.TemporaryDirectory(prefix="live-migration-kept-") as folder:
        Path(folder).chmod(0o755)
        server = LocalPostgres(Path(folder, "server"), server_bin=postgres_binaries(version), settings=SETTINGS)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


async def crash(uri: str) -> None:
    """Kill a session's process, upon which the server ends all others and recovers; wait until a session made since can ask it something."""
    connection = await asyncpg.connect(uri)
    os.kill(await connection.fetchval("select pg_backend_pid()"), signal.SIGKILL)
    with suppress(*LOST):
        await connection.execute("select pg_sleep(60)")
    connection.terminate()
    async with asyncio.timeout(60):
        while not await _has_recovered(uri):
            await asyncio.sleep(0.1)


async def _has_recovered(uri: str) -> bool:
    with suppress(*LOST):
        connection = await asyncpg.connect(uri)
        try:  # one that was let in just before the server ended all does not last so long
            await connection.execute("select pg_sleep(0.5)")
        finally:
            connection.terminate()
        return True
    return False
