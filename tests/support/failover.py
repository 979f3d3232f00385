"""A source with a streaming standby, behind one address: the standby lags when its link is cut, and takes over when the primary dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import asyncpg

from live_migration.common.local_postgres import LocalPostgres, server_account
from tests.fixtures.fix_postgres import SETTINGS, execute
from tests.support.proxy import Proxy

SLOT = "standby"


class Failover:
    """Primary, standby, the standby's link, and the address that a migration is given: `uri`."""

    def __init__(
        self, *, server_bin: Path | None = None, base_settings: dict[str, str] = SETTINGS, **settings: str
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="live-migration-standby-"))  # pytest's are for their owner alone
        self._server_bin, self._settings = server_bin, base_settings
        self.primary = LocalPostgres(server_bin=server_bin, settings=base_settings | settings)
        self.front, self.link = Proxy(lambda: self._leader().port), Proxy(lambda: self.primary.port)
        self.standby: LocalPostgres | None = None
        self._is_promoted = False

    def _leader(self) -> LocalPostgres:
        if not self._is_promoted:
            return self.primary
        assert self.standby is not None
        return self.standby

    async def __aenter__(self) -> Self:
        await self.primary.start()
        await self.front.start()
        await self.link.start()
        await execute(self.primary.uri(), f"select pg_create_physical_replication_slot('{SLOT}', true)")
        await execute(self.primary.uri(), "create database shop template template0")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.front.stop()
        await self.link.stop()
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
            server_bin=self._server_bin,
            settings=self._settings
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
        await self.front.stop()
        connection = await asyncpg.connect(self.standby_uri)
        assert await connection.fetchval("select pg_promote(true, 60)")
        await connection.close()
        self._is_promoted = True
        await self.front.start()
