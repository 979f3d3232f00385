"""Faults of servers that live: full, locked, read-only, in recovery, out of connections; sessions that somebody ends."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import asyncpg

from tests.chaos.disks import lay_read_only, lift_read_only
from tests.chaos.fault import Fault, LogEnd, Missed, Scene, direct, to_its_end
from tests.chaos.world import GONE, Disk, Side
from tests.support.workload import TABLES

_TOO_MANY = "53300"
_DISK_FULL = "53100"
_READ_ONLY = re.compile(r"Read-only file system|ReadOnlyFileSystemException")
_BROKER_FULL = re.compile(r"No space left on device|unsafe memory access")
"""The second is how the JVM tells that a page of a mapped index could not be had."""


class _Lock(Fault):
    """Somebody holds a lock on one of the user's tables. Whether anybody of ours then wanted it is not looked at."""

    side: ClassVar[Side]
    modes: ClassVar[tuple[str, ...]]

    async def inject(self, scene: Scene) -> str:
        table, mode = self.rng.choice(TABLES), self.rng.choice(self.modes)
        seconds = self.rng.uniform(1, 8)
        is_held = False
        try:
            async with direct(scene, self.side) as connection:
                await connection.execute(f"begin; set local lock_timeout = '4s'; lock table {table} in {mode} mode")
                is_held = True
                await asyncio.sleep(seconds)
                await connection.execute("rollback")
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError) as error:
            raise Missed(f"{table} is not there") from error
        except (*GONE, TimeoutError) as error:
            if not is_held:
                raise Missed(f"{table} could not be locked: {type(error).__name__}") from error
            return f"{table} in {mode} mode until {type(error).__name__}"
        return f"{table} in {mode} mode for {seconds:.1f} s"


class LockTarget(_Lock):
    name = "lock on target"
    side = "target"
    modes = ("access exclusive",)


class LockSource(_Lock):
    name = "lock on source"
    side = "source"
    modes = ("access exclusive", "share row exclusive", "share")


class NoConnections(Fault):
    """All of the target's connections are taken, and ours are cut; it hits when one of ours was refused."""

    name = "target out of connections"

    async def inject(self, scene: Scene) -> str:
        seconds = self.rng.uniform(1, 6)
        most = 0
        deadline = asyncio.get_running_loop().time() + seconds
        async with scene.world.busy["target"], AsyncExitStack() as stack:
            refused = stack.enter_context(scene.world.proxies["target"].counting_errors(_TOO_MANY))
            is_cut = False
            while asyncio.get_running_loop().time() < deadline:
                try:
                    connection = await asyncpg.connect(scene.world.uri("target", "postgres"), timeout=5)
                    stack.callback(connection.terminate)
                    most += 1
                except asyncpg.TooManyConnectionsError:
                    if not is_cut:
                        scene.world.proxies["target"].cut()
                        is_cut = True
                    await asyncio.sleep(0.05)
                except GONE:
                    await asyncio.sleep(0.1)
        if not refused.total():
            raise Missed(f"{most} taken, and nobody of ours was refused")
        return f"{most} taken for {seconds:.1f} s, {refused.total()} of ours refused"


class ReadOnly(Fault):
    """The target refuses to write, as a primary that was demoted."""

    name = "target read-only"

    async def inject(self, scene: Scene) -> str:
        seconds = self.rng.uniform(0.5, 6)
        async with scene.world.busy["target"]:
            await self._set(scene, f"alter database {scene.database} set default_transaction_read_only = on")
            try:
                await asyncio.sleep(seconds)
            finally:
                await self._set(scene, f"alter database {scene.database} reset default_transaction_read_only")
        return f"for {seconds:.1f} s"

    async def _set(self, scene: Scene, statement: str) -> None:
        async with direct(scene, "target", "postgres") as connection:
            await connection.execute(statement)
            await connection.fetch(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", scene.database
            )


class InRecovery(Fault):
    """The target comes back as a standby that is promoted later."""

    name = "target in recovery"

    async def inject(self, scene: Scene) -> str:
        seconds = self.rng.uniform(0.5, 5)
        server = scene.world.servers["target"]
        async with scene.world.busy["target"]:
            signal_file = server.data_dir / "standby.signal"
            signal_file.touch()
            owner = server.data_dir.stat()
            os.chown(signal_file, owner.st_uid, owner.st_gid)
            try:
                await to_its_end(server.restart(immediate=False))
                await asyncio.sleep(seconds)
            finally:
                async with direct(scene, "target", "postgres") as connection:
                    await connection.execute("select pg_promote()")
        return f"for {seconds:.1f} s"


class EndSessions(Fault):
    """An administrator ends or cancels some of our sessions, walsender included."""

    name = "end sessions"
    weight = 3

    async def inject(self, scene: Scene) -> str:
        side: Side = self.rng.choice(("source", "target"))
        function = self.rng.choice(("pg_terminate_backend", "pg_terminate_backend", "pg_cancel_backend"))
        share, times = self.rng.random(), self.rng.randrange(1, 6)
        hit = 0
        for _ in range(times):
            with suppress(*GONE):
                async with direct(scene, side) as connection:
                    hit += await connection.fetchval(
                        f"""select count({function}(pid)) from pg_stat_activity where datname = current_database()
                            and application_name like 'live-migration%' and random() < $1""",
                        share,
                    )
            await asyncio.sleep(self.rng.random())
        if not hit:
            raise Missed(f"{function} on {side}, 0 in {times} blows")
        return f"{function} on {side}, {hit} in {times} blows"


class _Full(Fault):
    """It hits when the lack of space was told: by the target to one of ours, by the broker in its log."""

    disk: ClassVar[Disk]

    @abstractmethod
    def watching(self, scene: Scene) -> AbstractContextManager[Callable[[], bool]]:
        """Give what tells whether anybody met the full disk meanwhile."""

    async def inject(self, scene: Scene) -> str:
        folder = scene.world.disks.get(self.disk)
        if folder is None:
            raise Missed(f"skipped: {scene.world.no_disks}")
        spare, seconds = round(10 ** self.rng.uniform(3, 6)), self.rng.uniform(0.5, 6)
        filler = folder / "filler"
        async with scene.world.busy[self.disk]:
            with self.watching(scene) as is_met:
                try:
                    _fill(filler, spare)
                    await asyncio.sleep(seconds)
                finally:
                    filler.unlink(missing_ok=True)
                if not is_met():
                    raise Missed(f"{spare} bytes free, and nobody wanted more")
        return f"{spare} bytes free for {seconds:.1f} s"


def _fill(filler: Path, spare: int) -> None:
    """Make a file that leaves `spare` bytes of its disk free."""
    with filler.open("wb") as file:
        while True:
            disk = os.statvfs(filler.parent)
            try:
                os.posix_fallocate(file.fileno(), 0, max(disk.f_bavail * disk.f_frsize - spare, 4096))
                return
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                if disk.f_bavail * disk.f_frsize <= spare:
                    return  # full enough already
                # The server has just taken what was free a moment ago.


class TargetDiskFull(_Full):
    name = "target's disk full"
    disk = "target"

    @contextmanager
    def watching(self, scene: Scene) -> Iterator[Callable[[], bool]]:
        with scene.world.proxies["target"].counting_errors(_DISK_FULL) as told:
            yield lambda: told.total() > 0


class BrokerDiskFull(_Full):
    """The broker ends itself when it cannot write; the world starts it again."""

    name = "broker's disk full"
    disk = "broker"

    @contextmanager
    def watching(self, scene: Scene) -> Iterator[Callable[[], bool]]:
        log = LogEnd(scene.world.logs()["broker.log"])
        yield lambda: log.tells(_BROKER_FULL)


SERVER_FAULTS: tuple[type[Fault], ...] = (
    LockTarget,
    LockSource,
    NoConnections,
    ReadOnly,
    InRecovery,
    EndSessions,
    TargetDiskFull,
    BrokerDiskFull,
)


class BrokerReadOnly(Fault):
    """The broker's disk is read-only for a while (see `lay_read_only`), which ends the broker at its next checkpoint or new file.

    It hits when the broker told of it. It is started again when the disk is mended, as an administrator does, also where it still runs: it has
    given its folder up then.
    """

    name = "broker read-only"
    weight = 3

    async def inject(self, scene: Scene) -> str:
        world, seconds = scene.world, self.rng.uniform(3, 12)
        folder = world.disks.get("broker")
        if folder is None:
            raise Missed(f"skipped: {world.no_disks}")
        async with world.busy["broker"]:
            log = LogEnd(world.logs()["broker.log"])
            lay_read_only(folder)
            try:
                await asyncio.sleep(seconds)
            finally:
                lift_read_only(folder)
                is_met, is_up = log.tells(_READ_ONLY), world.broker.is_running
                if is_met or not is_up:
                    await to_its_end(world.restart_broker())
        if not is_met:
            raise Missed("the broker wanted to write nothing that it could not")
        return f"for {seconds:.1f} s; the broker {'lived' if is_up else 'ended itself'}"


LATER_SERVER_FAULTS: tuple[type[Fault], ...] = (BrokerReadOnly,)
"""Those that came when rounds had been logged already: see `plan.LATER_SEED`."""
