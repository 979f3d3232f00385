"""A slot's backlog of inserted rows to all applied: ours, with both services running, against PostgreSQL's own apply.

    python benchmarks/backlog_inserts.py [--rows 2000000] [--rounds 3] [--mode binary|text]

One source and one target server, fsync on, 10,000 rows a transaction. Each round loads the rows once for us and once for
the native subscription, in turn, while the receiver in question stands still, then measures from letting it go until the last
row is on the target. Prints seconds, rows/s and the ratio native/ours of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import asyncpg
import psutil

from live_migration.common.local_kafka import LocalKafka
from live_migration.common.local_postgres import LocalPostgres

COMMAND = (sys.executable, "-P", "-m", "live_migration.coordinator.cli")
SERVER = {"wal_level": "logical", "max_wal_size": "8GB", "shared_buffers": "512MB", "max_worker_processes": "16"}
TABLE = "create table public.metrics (id bigint primary key, at timestamptz, device int, value float8)"
LOAD = """
    insert into public.metrics select i, timestamptz '2026-01-01' + i * interval '1 s', i % 100, i / 7.0
    from generate_series($1::bigint, $1 + 9999) i"""


async def load(uri: str, first: int, rows: int) -> None:
    connection = await asyncpg.connect(uri)
    for start in range(first, first + rows, 10_000):
        await connection.execute(LOAD, start)
    await connection.close()


async def until_applied(uri: str, last: int) -> float:
    """Wait for the row with the last key, looking by its index so that waiting costs nothing; give the time."""
    connection = await asyncpg.connect(uri)
    while not await connection.fetchval("select exists (select from public.metrics where id = $1)", last):
        await asyncio.sleep(0.02)
    await connection.close()
    return time.monotonic()


async def execute(uri: str, *statements: str) -> None:
    connection = await asyncpg.connect(uri)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


async def until_replay(uri: str) -> None:
    connection = await asyncpg.connect(uri)
    while True:
        try:
            if await connection.fetchval("select phase from _live_migration.migration") == "replay":
                break
        except asyncpg.PostgresError:
            pass
        await asyncio.sleep(0.1)
    await connection.close()


async def run(rows: int, rounds: int, mode: str) -> None:
    ours: list[float] = []
    native: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        async with (
            LocalPostgres(settings=SERVER) as source,
            LocalPostgres(settings=SERVER) as target,
            LocalKafka() as kafka,
        ):
            for name in ("ours", "native"):
                await execute(source.uri(), f"create database {name}")
                await execute(target.uri(), f"create database {name}")
                await execute(source.uri(name), TABLE)
            if mode == "text":
                await execute(
                    source.uri("ours"), "create type e as enum ('x')", "create table forces_text (e e primary key)"
                )
            await execute(target.uri("native"), TABLE)
            await execute(source.uri("native"), "create publication bench for table public.metrics")
            binary = str(mode == "binary").lower()
            await execute(source.uri("native"), "select pg_create_logical_replication_slot('bench', 'pgoutput')")
            await execute(
                target.uri("native"),
                f"create subscription bench connection '{source.uri('native')}' publication bench "
                f"with (create_slot = false, copy_data = false, enabled = false, binary = {binary}, slot_name = 'bench')",
            )
            environment = {
                **os.environ,
                "SOURCE": source.uri("ours"),
                "TARGET": target.uri("ours"),
                "KAFKA": kafka.bootstrap,
            }
            log = os.open(Path(folder, "migrate.log"), os.O_CREAT | os.O_WRONLY)
            migrate = await asyncio.create_subprocess_exec(
                *COMMAND,
                "migrate",
                "--consumers",
                "1",
                "--dir",
                str(Path(folder, "data")),
                env=environment,
                stdout=log,
                stderr=log,
            )
            try:
                await until_replay(target.uri("ours"))
                workers = psutil.Process(migrate.pid).children(recursive=True)
                (producer,) = [
                    w for w in workers if "producer" in w.cmdline() and "live_migration.coordinator.cli" in w.cmdline()
                ]
                for number in range(rounds):
                    first = 1 + number * rows
                    last = first + rows - 1
                    producer.send_signal(signal.SIGSTOP)
                    await load(source.uri("ours"), first, rows)
                    await execute(source.uri(), "checkpoint")
                    await execute(target.uri(), "checkpoint")
                    began = time.monotonic()
                    producer.send_signal(signal.SIGCONT)
                    ours.append(await until_applied(target.uri("ours"), last) - began)
                    await load(source.uri("native"), first, rows)
                    await execute(source.uri(), "checkpoint")
                    await execute(target.uri(), "checkpoint")
                    began = time.monotonic()
                    await execute(target.uri("native"), "alter subscription bench enable")
                    native.append(await until_applied(target.uri("native"), last) - began)
                    await execute(target.uri("native"), "alter subscription bench disable")
                    print(f"round {number + 1}: ours {ours[-1]:.2f} s, native {native[-1]:.2f} s", flush=True)
            finally:
                migrate.send_signal(signal.SIGINT)
                await migrate.wait()
                await execute(
                    target.uri("native"),
                    "alter subscription bench disable",
                    "alter subscription bench set (slot_name = none)",
                    "drop subscription bench",
                )
    mine, theirs = statistics.median(ours), statistics.median(native)
    print(
        f"{rows:,} rows, {mode}: ours {mine:.2f} s ({rows / mine:,.0f} rows/s), native {theirs:.2f} s "
        f"({rows / theirs:,.0f} rows/s), ratio {theirs / mine:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", choices=("binary", "text"), default="binary")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.rows, arguments.rounds, arguments.mode))


if __name__ == "__main__":
    main()
