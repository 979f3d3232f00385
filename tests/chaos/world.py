"""The servers of a chaos run, each behind a proxy of its own, and fresh databases on them for each round."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal, Self

import asyncpg

from live_migration.common.local_kafka import LocalKafka
from live_migration.common.local_postgres import LocalPostgres, server_account
from live_migration.common.postgres import CONNECTION_ERRORS
from tests.chaos.disks import mount, unmount, why_no_disks
from tests.fixtures.fix_postgres import drop_slots, execute
from tests.support.proxy import Proxy

Side = Literal["source", "target"]
Endpoint = Literal["source", "target", "broker"]
Disk = Literal["target", "broker"]

GONE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, *CONNECTION_ERRORS)
"""What the harness's own sessions meet when a fault has hit their server."""
DISKS: tuple[Disk, ...] = ("target", "broker")

SERVER = {
    "wal_level": "logical",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
    "max_connections": "80",
    "max_prepared_transactions": "10",
    "fsync": "off",  # servers crash here, the machine does not: what was written stays
    "wal_sender_timeout": "10s",
}


class World:
    """Source, target and broker, kept over rounds; `async with` starts and stops them.

    The harness goes to the servers directly; the processes under test only through `proxies`.
    """

    def __init__(self, *, small_disks: bool = True) -> None:
        """Describe the servers.

        Args:
            small_disks: target and broker on disks of 256 MiB that a fault can fill, where these can be made.
        """
        self.servers: dict[Side, LocalPostgres] = {
            "source": LocalPostgres(settings=SERVER),
            "target": LocalPostgres(settings=SERVER),
        }
        self._broker: LocalKafka | None = None
        self.proxies: dict[Endpoint, Proxy] = {
            "source": Proxy(lambda: self.servers["source"].port),
            "target": Proxy(lambda: self.servers["target"].port),
            "broker": Proxy(lambda: int(self.broker.bootstrap.rpartition(":")[2])),
        }
        self.disks: dict[Disk, Path] = {}
        """Small ones, for the target's tables and the broker's log; none where nothing may be mounted."""
        self.no_disks = why_no_disks() if small_disks else "not in this run"
        self.broker_ends = 0
        self._stack = AsyncExitStack()
        self.busy: dict[Endpoint, asyncio.Lock] = {each: asyncio.Lock() for each in self.proxies}
        """Held by a fault that stops the server: two of them do not meet at one."""

    @property
    def broker(self) -> LocalKafka:
        assert self._broker is not None
        return self._broker

    @property
    def broker_log(self) -> Path:
        """The folder that holds the broker's topics."""
        return self.disks["broker"] / "log" if "broker" in self.disks else self.broker.folder / "data"

    async def __aenter__(self) -> Self:
        try:
            for proxy in self.proxies.values():
                await self._stack.enter_async_context(proxy)
            # The broker sends its clients, the one that asks whether it is ready too, to the proxy.
            advertised = f"PLAINTEXT://127.0.0.1:{self.proxies['broker'].port}"
            settings = {"advertised.listeners": advertised}
            if not self.no_disks:
                self._mount_disks()
            if "broker" in self.disks:
                settings["log.dirs"] = str(self.broker_log)
            self._broker = LocalKafka(settings=settings)
            for server in (*self.servers.values(), self._broker):
                await self._stack.enter_async_context(server)
            keeper = asyncio.create_task(self._keep_broker())
            self._stack.callback(keeper.cancel)
            if "target" in self.disks:
                await execute(
                    self.servers["target"].uri(),
                    f"create tablespace small location '{self.disks['target'] / 'tables'}'",
                )
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _keep_broker(self) -> None:
        """Start the broker again when it has ended itself, as one does whose disk was full."""
        while True:
            await asyncio.sleep(0.5)
            if self.broker.is_running or self.busy["broker"].locked():
                continue
            async with self.busy["broker"]:
                self.broker_ends += 1
                await self.restart_broker()

    async def restart_broker(self) -> None:
        """End what is left of the broker and start it again; whoever calls holds `busy`."""
        await self.broker.kill()
        await self.broker.start()

    def uri(self, side: Side, database: str) -> str:
        """Give the direct way to a database, for the harness."""
        return self.servers[side].uri(database)

    def proxied_uri(self, side: Side, database: str) -> str:
        """Give the way through the proxy, for the processes under test."""
        return self.proxies[side].uri(self.uri(side, database))

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.proxies['broker'].port}"

    def _mount_disks(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="live-migration-disks-")))
        folder.chmod(0o755)
        account = server_account()
        for disk in DISKS:
            try:
                mount(folder / disk)
            except subprocess.CalledProcessError as error:
                self.no_disks = f"mount: {error.stderr.decode().strip()}"
                return
            self._stack.callback(unmount, folder / disk)
            self.disks[disk] = folder / disk
            content = folder / disk / {"target": "tables", "broker": "log"}[disk]
            content.mkdir()
            if disk == "target" and account is not None:
                os.chown(content, account.pw_uid, account.pw_gid)

    async def create_databases(self, name: str) -> None:
        for side in self.servers:
            where = "tablespace small" if side in self.disks else ""
            await execute(self.servers[side].uri(), f"create database {name} template template0 {where}")

    async def drop_databases(self, name: str) -> None:
        """Drop what a round left, its slots and sessions included."""
        for server in self.servers.values():
            connection = await asyncpg.connect(server.uri())
            try:
                await drop_slots(connection, name)
                await connection.execute(f"drop database if exists {name} with (force)")
            finally:
                await connection.close()

    async def heal(self) -> None:
        """Put everything right that a fault may have left: proxies forward, servers run."""
        for proxy in self.proxies.values():
            proxy.heal()

    def logs(self) -> dict[str, Path]:
        """Give the servers' logs by name."""
        return {
            "source.log": self.servers["source"].log_path,
            "target.log": self.servers["target"].log_path,
            "broker.log": self.broker.folder / "broker.log",
        }
