"""Whole migrations from a plain PostgreSQL into hypertables."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.settings import load_settings
from live_migration.coordinator.findings import Finding
from live_migration.coordinator.preflight import validate
from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration
from tests.e2e.test_cli import on_terminal, run
from tests.fixtures.fix_postgres import execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SCHEMA = """
    create schema "App";
    create table devices (id int primary key, name text);
    create table "App"."Metrics" (time timestamptz not null, device int not null references devices, v float8, note text,
                                  primary key (device, time));
    create index by_note on "App"."Metrics" (note, time);
    create table log (at bigint not null, line text, seen date default '2026-01-01');
    create index on log (at);
    create table orders (id bigint generated always as identity primary key, placed timestamptz not null, v int);
    create table items (order_id bigint references orders, n int);
    create function stamp() returns trigger language plpgsql as 'begin new.note := coalesce(new.note, ''none''); return new; end';
    create trigger stamp before insert on "App"."Metrics" for each row execute function stamp();
    insert into devices select g, 'd' || g from generate_series(1, 9) g;
    insert into "App"."Metrics" select t, d, d, repeat('x', 60)
        from generate_series('2026-01-01'::timestamptz, '2026-01-06', '5 min') t, generate_series(1, 5) d;
    insert into log select g * 10, 'line ' || g from generate_series(1, 5000) g;
    insert into log select at, line from log where at < 300;
    insert into orders (placed, v) select '2026-01-01'::timestamptz + g * interval '1 hour', g from generate_series(1, 200) g;
    insert into items select g, 1 from generate_series(1, 200) g;
"""
FILE = """
# one with a space dimension
"App"."Metrics":time,1 day,device,3
log:at,10000
"""
_SHAPES = """
    select hypertable_schema, hypertable_name, dimension_number, column_name, time_interval::text, integer_interval, num_partitions
    from timescaledb_information.dimensions order by 1, 2, 3
"""
_CHUNKS = """
    select hypertable_name, count(*) from timescaledb_information.chunks group by 1 order by 1
"""


@asynccontextmanager
async def writing(uri: str) -> AsyncIterator[list[str]]:
    """Write to the tables until left; gives the statements that were run."""
    stop, done = asyncio.Event(), []

    async def write(seed: int) -> None:
        rng = random.Random(seed)
        connection = await asyncpg.connect(uri)
        try:
            while not stop.is_set():
                statement = rng.choices(_STATEMENTS, [8, 3, 2, 2, 8, 3])[0].format(
                    device=rng.randrange(1, 10),
                    second=rng.randrange(0, 8 * 86400),
                    at=rng.randrange(0, 90_000),
                    old=rng.randrange(0, 900),
                )
                try:
                    await connection.execute(statement)
                    done.append(statement.split()[0])
                except asyncpg.DeadlockDetectedError:
                    pass
                await asyncio.sleep(0.01)
        finally:
            await connection.close()

    tasks = [asyncio.ensure_future(write(seed)) for seed in range(2)]
    try:
        yield done
    finally:
        stop.set()
        await asyncio.gather(*tasks)


_STATEMENTS = [
    """insert into "App"."Metrics" values ('2026-01-01'::timestamptz + interval '{second} s', {device}, 1)
       on conflict (device, time) do update set v = excluded.v + 1, note = 'again'""",
    """update "App"."Metrics" set v = v + 1 where device = {device} and time > '2026-01-01'::timestamptz + interval '{second} s'""",
    """delete from "App"."Metrics" where (device, time) in (select device, time from "App"."Metrics"
       where device = {device} and time > '2026-01-01'::timestamptz + interval '{second} s' order by time limit 3)""",
    """update "App"."Metrics" set time = time + interval '1 day 0.0001 s' where (device, time) in (select device, time from "App"."Metrics"
       where device = {device} and time > '2026-01-01'::timestamptz + interval '{second} s' order by time limit 1)""",
    "insert into log select {at} + g, 'new' from generate_series(1, 3) g",
    "delete from log where at = {old}",
]


async def test_tables_under_load_become_hypertables(
    source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """One has a space dimension and one no key; large tables come in parts, a consumer is lost meanwhile."""
    source, target = source_database, target_of_timescale
    connection = await asyncpg.connect(source)
    await connection.execute(SCHEMA)
    await connection.close()
    file = tmp_path / "hypertables.txt"
    file.write_text(FILE)
    options = {
        "hypertables_file": file,
        "hypertable": ("orders:placed,1 day",),
        "skip_hypertable_incompatible_objects": True,
        "part_size": 256 << 10,
        "lease": 3.0,
    }
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        async with writing(source) as done:
            await migration.until(
                "a part copied", "select count(*) > 0 from _live_migration.parts where state = 'done'"
            )
            await migration.consumers[0].crash()
            migration.consumers[0].start()
            await migration.until_phase("replay", timeout=240)
            before = len(done)
            await migration.until("rows under load", "select sum(change_count) > 300 from _live_migration.checkpoints")
            while len(done) < before + 200:
                migration.raise_failures()
                await asyncio.sleep(0.1)
        await migration.finish()
        print("\n".join(migration.observer.notes + migration.observer.warnings))
        report = await verify(migration.settings)
        assert report.is_equal, report.results
        await _check(source, target)


async def test_one_command_and_a_file_bring_a_database_under_load_into_hypertables(
    source_database: str, target_of_timescale: str, unique_name: str, tmp_path: Path
) -> None:
    """`live-migration migrate` on a terminal, with a broker, a producer and consumers of its own; the cutover is asked for there."""
    source, target = source_database, target_of_timescale
    await execute(source, SCHEMA)
    file = tmp_path / "hypertables.txt"
    file.write_text(FILE + "orders:placed,1 day\n")
    kept = {name: value for name, value in os.environ.items() if name != "KAFKA" and "LIVE_MIGRATION_" not in name}
    ours = {
        "LIVE_MIGRATION_NAME": unique_name,
        "LIVE_MIGRATION_DIR": str(tmp_path / "data"),
        "LIVE_MIGRATION_CONSUMERS": "2",
        "TERM": "xterm",
    }
    environment = {**kept, **ours, "SOURCE": source, "TARGET": target}
    skip = "--skip-hypertable-object"
    command = (
        "migrate",
        "--hypertables-file",
        str(file),
        skip,
        "orders.orders_pkey",
        skip,
        "items.items_order_id_fkey",
    )
    async with AsyncExitStack() as load:
        done = await load.enter_async_context(writing(source))
        async with on_terminal(environment, *command) as screen:
            await screen.until("phase replay")
            before = len(done)
            while len(done) < before + 300:
                assert screen.process.returncode is None, screen.shown
                await asyncio.sleep(0.1)
            await screen.until("Target has caught up with source")
            await load.aclose()
            screen.type("c\n")
            assert await asyncio.wait_for(screen.process.wait(), 180) == 0, screen.shown
            assert "write to the target now" in screen.shown
            assert "changes replayed" in screen.shown
    assert {"insert", "update", "delete"} <= set(done)
    code, out, said = await run(environment, "verify", "--json")
    assert (code, json.loads(out)["equal"]) == (0, True), said
    await _check(source, target)
    code, _, said = await run(environment, "clean", "--prune")
    assert code == 0, said
    assert await world.value(source, "select count(*) from pg_replication_slots where slot_name = $1", unique_name) == 0


async def test_validate_says_what_cannot_be_a_hypertable(source_database: str, target_of_timescale: str) -> None:
    await execute(source_database, SCHEMA)

    async def found(**options: object) -> list[Finding]:
        settings = load_settings({"source": source_database, "target": target_of_timescale, **options})
        return [each for each in await validate(settings) if "hypertable" in each.what]

    assert await found() == []
    refused = await found(hypertable=("orders:placed,1 day", "absent:at,7"))
    refused = [each for each in refused if each.level == "error"]
    assert any("primary key orders_pkey lacks the partitioning column placed" in each.what for each in refused)
    assert any("public.absent: there is no such table" in each.what for each in refused)
    left_out = await found(hypertable=("orders:placed,1 day",), skip_hypertable_incompatible_objects=True)
    assert {each.level for each in left_out} == {"warning"}
    only_key = await found(hypertable=("orders:placed,1 day",), skip_hypertable_object=("orders.orders_pkey",))
    (refused_still,) = [each for each in only_key if each.level == "error"]
    assert "items_order_id_fkey" in refused_still.what
    (no_table,) = await found(skip_hypertable_object=("orders.orders_pkey",))
    assert (no_table.level, "no table is to become a hypertable" in no_table.what) == ("error", True)
    (unreadable,) = await found(hypertable=("orders",))
    assert unreadable.level == "error"


async def _check(source: str, target: str) -> None:
    here, there = await asyncpg.connect(source), await asyncpg.connect(target)
    try:
        for table in ("devices", '"App"."Metrics"', "log", "orders", "items"):
            ours, theirs = await world.rows_of(here, table), await world.rows_of(there, table)
            assert ours == theirs, table
        assert [tuple(row) for row in await there.fetch(_SHAPES)] == [
            ("App", "Metrics", 1, "time", "1 day", None, None),
            ("App", "Metrics", 2, "device", None, None, 3),
            ("public", "log", 1, "at", None, 10000, None),
            ("public", "orders", 1, "placed", "1 day", None, None),
        ]
        assert all(row[1] > 3 for row in await there.fetch(_CHUNKS))
        keys = await there.fetch(
            """select conrelid::regclass::text, conname from pg_constraint where contype in ('p', 'f')
               and conrelid in (select relid from (values ('devices'::regclass), ('"App"."Metrics"'), ('orders'), ('items'), ('log')) t (relid))
               order by 1, 2"""
        )
        assert [tuple(row) for row in keys] == [
            ('"App"."Metrics"', "Metrics_device_fkey"),
            ('"App"."Metrics"', "Metrics_pkey"),
            ("devices", "devices_pkey"),
        ]
        assert await there.fetchval("select count(*) from pg_indexes where tablename = 'Metrics'") == 2
        assert (
            await there.fetchval("""insert into "App"."Metrics" values ('2027-01-01', 1, 1) returning note""") == "none"
        )
        assert await there.fetchval("insert into orders (placed) values (now()) returning id") > 200
    finally:
        await here.close()
        await there.close()
