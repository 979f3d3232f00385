"""The servers of one contestant: a source and a target of its own, alike for everybody, and a broker for us."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg
import psutil

from live_migration.common.local_kafka import KAFKA_VERSION, LocalKafka
from live_migration.common.local_postgres import LocalPostgres, postgres_binaries

DATABASE = "bench"
WHEEL_MAJOR = 18

POSTGRES_SETTINGS = {
    "wal_level": "logical",
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "512MB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "30min",
    "maintenance_work_mem": "512MB",
    "max_worker_processes": "16",
    "max_connections": "100",
    "max_locks_per_transaction": "512",  # pg_dump locks each table of many_tables
    "autovacuum": "off",  # VACUUM ANALYZE is run between the rounds, on both sides, outside of what is measured
    "wal_sender_timeout": "1h",  # our walsender stands still while a backlog is loaded; 0 would cost every walsender a system call a row
}
KAFKA_FLUSHES_EACH_APPEND = True  # as the broker that `migrate` runs itself: its log outlives a crash without a replica


@dataclass(frozen=True)
class Servers:
    """A source and a target with the empty database `bench` on each; `kafka` only for who needs one."""

    source: LocalPostgres
    target: LocalPostgres
    kafka: LocalKafka | None

    @property
    def source_uri(self) -> str:
        return self.source.uri(DATABASE)

    @property
    def target_uri(self) -> str:
        return self.target.uri(DATABASE)

    async def recreate_target(self) -> None:
        """Make the target's database anew."""
        await execute(
            self.target.uri(), f"drop database if exists {DATABASE} with (force)", f"create database {DATABASE}"
        )

    async def checkpoint(self) -> None:
        """Bring both servers to rest: what was written before is not paid for by what is measured next."""
        await execute(self.source.uri(), "checkpoint")
        await execute(self.target.uri(), "checkpoint")

    def kind_of(self, process: psutil.Process) -> str | None:
        """Give the kind of a process of these servers, None for one that is not theirs."""
        for server, where in ((self.source, "source"), (self.target, "target")):
            if process.pid == server.pid or process.ppid() == server.pid:
                return _postgres_kind(where, process)
        return None


def _postgres_kind(where: str, process: psutil.Process) -> str:
    """Tell from the title that PostgreSQL gives its processes."""
    title = " ".join(process.cmdline())
    if "walsender" in title:
        return "walsender"
    if "logical replication" in title and "apply worker" in title:
        return "apply worker"
    if "logical replication tablesync" in title or f" {DATABASE} " in title or "parallel worker" in title:
        return f"{where} backends"
    return f"{where} background"


@asynccontextmanager
async def running_servers(*, major: int = WHEEL_MAJOR, with_kafka: bool) -> AsyncIterator[Servers]:
    """Start the servers; they are thrown away at the end."""
    binaries = None if major == WHEEL_MAJOR else await asyncio.to_thread(postgres_binaries, major)
    source = LocalPostgres(server_bin=binaries, settings=POSTGRES_SETTINGS)
    target = LocalPostgres(server_bin=binaries, settings=POSTGRES_SETTINGS)
    kafka = LocalKafka(flush_each_append=KAFKA_FLUSHES_EACH_APPEND) if with_kafka else None
    try:
        for server in (source, target):
            await server.start()
            await execute(server.uri(), f"create database {DATABASE}")
        if kafka:
            await kafka.start()
        yield Servers(source, target, kafka)
    finally:
        for each in (kafka, target, source):
            if each:
                await each.stop()


async def execute(uri: str, *statements: str) -> None:
    """Run statements, each in a transaction of its own."""
    connection = await asyncpg.connect(uri)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def active_walsender(uri: str, slot: str) -> int:
    """Give the pid of the walsender that reads a slot."""
    connection = await asyncpg.connect(uri)
    try:
        return int(await connection.fetchval("select active_pid from pg_replication_slots where slot_name = $1", slot))
    finally:
        await connection.close()


async def server_version(uri: str) -> str:
    connection = await asyncpg.connect(uri)
    try:
        return str(await connection.fetchval("show server_version"))
    finally:
        await connection.close()


def settings_used() -> dict[str, object]:
    """Give what was set on the servers, for the report."""
    return {
        "postgresql": POSTGRES_SETTINGS,
        "kafka": {"version": KAFKA_VERSION, "flush_each_append": KAFKA_FLUSHES_EACH_APPEND},
    }
