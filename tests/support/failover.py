"""A source with a streaming standby, behind one address: the standby lags when its link is cut, and takes over when the primary dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import asyncpg

from live_migration.common.local_postgres import LocalPostgres, server_account
from tests.fixtures.fix_postgres import SETTINGS, execute

SLOT = "standby"


class Forwarder:
    """A TCP port of ours that leads to another one, until it is cut."""

    def __init__(self, port: int | None) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lead_to(None)
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lead_to(self, port: int | None) -> None:
        """Break all connections; new ones lead to this port, or are closed at once."""
        self._to = port
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            if self._to is None:
                return
            back, there = await asyncio.open_connection("127.0.0.1", self._to)
            self._writers.add(there)
            pumps = [asyncio.ensure_future(_pump(reader, there)), asyncio.ensure_future(_pump(back, writer))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass
        finally:
            for each in (writer, there):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort()
            self._tasks.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


class Failover:
    """Primary, standby, the standby's link, and the address that a migration is given: `uri`."""

    def __init__(self, **settings: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="live-migration-standby-"))  # pytest's are for their owner alone
        self.primary = LocalPostgres(settings=SETTINGS | settings)
        self.front, self.link = Forwarder(None), Forwarder(None)
        self.standby: LocalPostgres | None = None

    async def __aenter__(self) -> Self:
        await self.primary.start()
        await self.front.__aenter__()
        await self.link.__aenter__()
        self.front.lead_to(self.primary.port)
        self.link.lead_to(self.primary.port)
        await execute(self.primary.uri(), f"select pg_create_physical_replication_slot('{SLOT}', true)")
        await execute(self.primary.uri(), "create database shop template template0")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.front.__aexit__(kind, error, trace)
        await self.link.__aexit__(kind, error, trace)
        if self.standby is not None:
            await self.standby.stop()
        await self.primary.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def uri(self) -> str:
        """Where the migration finds its source, whoever that is."""
        return f"postgresql://postgres@127.0.0.1:{self.front.port}/shop"

    @property
    def primary_uri(self) -> str:
        return self.primary.uri("shop")

    @property
    def standby_uri(self) -> str:
        assert self.standby is not None
        return self.standby.uri("shop")

    async def start_standby(self) -> None:
        """Make the standby from a base backup, and wait until it streams."""
        data = self._folder / "data"
        backup = await asyncio.create_subprocess_exec(
            *(str(self.primary.bin_dir / "pg_basebackup"), "-D", str(data), "-c", "fast", "-X", "stream", "--no-sync"),
            *("-d", self.primary.uri()),
            stderr=subprocess.PIPE,
        )
        _, told = await backup.communicate()
        assert backup.returncode == 0, told.decode()
        (data / "standby.signal").touch()
        if account := server_account():
            for path in (self._folder, data, *data.rglob("*")):
                os.chown(path, account.pw_uid, account.pw_gid)
        data.chmod(0o700)
        conninfo = f"host=127.0.0.1 port={self.link.port} user=postgres dbname=postgres"
        self.standby = LocalPostgres(
            self._folder,
            settings=SETTINGS
            | {"primary_conninfo": conninfo, "primary_slot_name": SLOT, "hot_standby_feedback": "on"}
            | {"wal_retrieve_retry_interval": "100ms", "sync_replication_slots": "on"},
        )
        await self.standby.start()
        await self.until_caught_up()

    async def until_caught_up(self) -> None:
        """Wait until the standby has replayed what the primary has written by now."""
        connection, standby = await asyncpg.connect(self.primary.uri()), await asyncpg.connect(self.standby_uri)
        try:
            lsn = await connection.fetchval("select pg_current_wal_insert_lsn()::text")
            async with asyncio.timeout(60):
                while not await standby.fetchval("select pg_last_wal_replay_lsn() >= $1::text::pg_lsn", lsn):
                    await asyncio.sleep(0.05)
        finally:
            await connection.close()
            await standby.close()

    async def until_slot_is_there(self, slot: str) -> None:
        """Wait until the standby has a failover slot for good."""
        connection, primary = await asyncpg.connect(self.standby_uri), await asyncpg.connect(self.primary.uri())
        synced = "select synced and not temporary from pg_replication_slots where slot_name = $1"
        try:
            async with asyncio.timeout(120):
                while not await connection.fetchval(synced, slot):
                    await primary.execute("select pg_log_standby_snapshot()")
                    await asyncio.sleep(0.2)
        finally:
            await connection.close()
            await primary.close()

    async def promote(self) -> None:
        """Kill the primary, make the standby the new one, and lead the migration to it."""
        os.kill(self.primary.pid, signal.SIGKILL)
        self.front.lead_to(None)
        connection = await asyncpg.connect(self.standby_uri)
        assert await connection.fetchval("select pg_promote(true, 60)")
        await connection.close()
        assert self.standby is not None
        self.front.lead_to(self.standby.port)
