"""A whole schema by pg_dump from one version to another: what TimescaleDB makes is left out, what stands on aggregates waits."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator import client_programs
from live_migration.coordinator.dump_script import Entry, parse_script
from live_migration.coordinator.hypertable_definitions import Definitions
from live_migration.coordinator.hypertable_entries import (
    EntriesOfTimescale,
    part_entries,
    read_entries_of_timescale,
    without_only,
)
from live_migration.coordinator.hypertable_gaps import read_target
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.hypertable_sql import (
    aggregate_index_statements,
    aggregate_statements,
    compression_statements,
    hypertable_statements,
    job_statement,
    schedule_statement,
)
from tests.fixtures.fix_postgres import Server
from tests.fixtures.fix_timescale import timescale_database

SCRIPT = (
    "create table kinds (id int primary key)",
    """create table metrics (time timestamptz not null, device int not null references kinds, v float8 default 1 check (v > -9),
                             primary key (device, time))""",
    "select create_hypertable('metrics', 'time', chunk_time_interval => interval '1 day')",
    "alter table metrics set (timescaledb.compress, timescaledb.compress_segmentby = 'device')",
    "create function f() returns trigger language plpgsql as 'begin return new; end'",
    "create trigger g before insert on metrics for each row execute function f()",
    "alter table metrics replica identity using index metrics_pkey",
    "alter table metrics cluster on metrics_time_idx",
    "alter table metrics add constraint later check (v < 1e9) not valid",
    "create statistics s on device, v from metrics",
    """create materialized view hourly with (timescaledb.continuous, timescaledb.materialized_only = false) as
       select time_bucket('1 hour', time) as hour, device, sum(v) as v from metrics group by 1, 2 with no data""",
    """create materialized view a_daily with (timescaledb.continuous) as
       select time_bucket('1 day', hour) as day, sum(v) as v from hourly group by 1 with no data""",
    'create index "mine" on hourly (v)',
    "create view a_first as select * from hourly where device > 0",
    "create rule r as on update to a_first do instead nothing",
    "create view a_second as select count(*) from a_first",
    "create materialized view a_kept as select day, v + 1 as v from a_daily with no data",
    "create unique index on a_kept (day)",
    "create function a_total() returns float8 language sql begin atomic select sum(v) from a_first; end",
    "create function a_row(hourly) returns float8 language sql as 'select $1.v'",
    "create view by_function as select a_total()",
    "create view plain as select * from metrics",
    "create table of_rows (id int, r hourly)",
    "comment on view hourly is 'hours'",
    "comment on column hourly.v is 'value'",
    "comment on table metrics is 'metrics'",
    "insert into kinds values (1), (2)",
    "insert into metrics select t, 1, 2 from generate_series('2026-01-01'::timestamptz, '2026-01-03', '10 minutes') t",
    "call refresh_continuous_aggregate('hourly', null, null)",
    "call refresh_continuous_aggregate('a_daily', null, null)",
    "select compress_chunk(c) from show_chunks('metrics', older_than => '2026-01-02'::timestamptz) c",
    "select add_compression_policy('metrics', interval '10 days')",
    "select add_reorder_policy('metrics', 'metrics_pkey')",
    "select add_continuous_aggregate_policy('hourly', interval '1 month', interval '1 hour', interval '1 hour')",
)
_OBJECTS = """
    select c.relkind::text, n.nspname::text, c.relname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = 'public' and not exists (
        select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
    union all select contype::text, conrelid::regclass::text, conname::text from pg_constraint
    where connamespace = 'public'::regnamespace and conrelid <> 0
    union all select 'identity', relname::text, relreplident::text from pg_class where relname = 'metrics'
    union all select 'cluster', indrelid::regclass::text, indexrelid::regclass::text from pg_index where indisclustered
      and indrelid = 'metrics'::regclass
    union all select 'rule', ev_class::regclass::text, rulename::text from pg_rewrite where rulename = 'r'
    union all select 'trigger', tgrelid::regclass::text, tgname::text from pg_trigger
    where not tgisinternal and tgrelid::regclass::text not like '\\_timescaledb%'
    union all select 'function', proname::text, '' from pg_proc where pronamespace = 'public'::regnamespace
      and not exists (select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = pg_proc.oid and d.deptype = 'e')
    union all select 'comment', d.objoid::regclass::text, d.objsubid || d.description from pg_description d
    where d.classoid = 'pg_class'::regclass and d.objoid::regclass::text in ('hourly', 'metrics')
    order by 1, 2, 3
"""


async def _dump(
    uri: str, folder: Path
) -> tuple[Definitions, EntriesOfTimescale, dict[str, list[Entry]], list[asyncpg.Record]]:
    connection = await asyncpg.connect(uri)
    try:
        for statement in SCRIPT:
            await connection.execute(statement)
        programs = client_programs.find_programs(18)
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            snapshot = await connection.fetchval("select pg_export_snapshot()")
            archive = folder / "schema.dump"
            await client_programs.dump_schema(programs, uri, archive, snapshot=snapshot, lock_timeout=5)
            definitions, keys = await read_definitions(connection), await read_entries_of_timescale(connection)
            objects = await connection.fetch(_OBJECTS)
    finally:
        await connection.close()
    assert definitions is not None
    sections = {
        section: parse_script(await client_programs.write_script(programs, archive, section=section))
        for section in ("pre-data", "post-data")
    }
    return definitions, keys, sections, objects


async def _restore(
    uri: str, definitions: Definitions, keys: EntriesOfTimescale, sections: dict[str, list[Entry]]
) -> None:
    connection = await asyncpg.connect(uri)
    try:
        target = await read_target(connection)
        assert target is not None
        before, after = part_entries(sections["pre-data"], keys)
        roots = {each.name for each in definitions.hypertables}
        post_data = [without_only(entry, roots) for part in part_entries(sections["post-data"], keys) for entry in part]
        making = [
            statement
            for hypertable in definitions.hypertables
            for statement in hypertable_statements(hypertable, target) + compression_statements(hypertable, target)
        ] + [
            statement
            for aggregate in definitions.aggregates
            for statement in aggregate_statements(aggregate, target) + aggregate_index_statements(aggregate)
        ]
        for statement in [
            *(entry.statements for entry in before if entry.type != "SCHEMA"),
            *making,
            *(entry.statements for entry in [*after, *post_data]),
        ]:
            await connection.execute(statement)
        names = [each.name for each in definitions.aggregates]
        for job in definitions.jobs:
            made = await connection.fetchval(job_statement(job, names, target))
            await connection.execute(
                schedule_statement(made, target, is_scheduled=job.is_scheduled, timezone=job.timezone)
            )
    finally:
        await connection.close()


@pytest.mark.parametrize("turn", [1, -1])
async def test_whole_schema(timescale_source: Server, other_timescale: Server, tmp_path: Path, turn: int) -> None:
    source, target = [timescale_source, other_timescale][::turn]
    async with timescale_database(source) as source_uri, timescale_database(target) as target_uri:
        definitions, keys, sections, objects = await _dump(source_uri, tmp_path)
        await _restore(target_uri, definitions, keys, sections)
        connection = await asyncpg.connect(target_uri)
        try:
            assert await read_definitions(connection) == definitions
            assert await connection.fetch(_OBJECTS) == objects
            await _check_results(source_uri, connection)
            assert (
                await connection.fetchval(
                    "select count(*) from pg_class where relname like '%compress%' and relkind = 'r' and relname like '%chunk%'"
                    " and relnamespace = '_timescaledb_internal'::regnamespace"
                )
                == 0
            )
        finally:
            await connection.close()


async def _check_results(source_uri: str, target: asyncpg.Connection) -> None:
    """Rows copied into the root and aggregates refreshed give what the source's give."""
    source = await asyncpg.connect(source_uri)
    try:
        await target.execute("insert into kinds values (1), (2)")
        rows = await source.fetch("select * from metrics")
        await target.copy_records_to_table("metrics", records=rows)
        for name in ("hourly", "a_daily"):
            await target.execute(f"call refresh_continuous_aggregate('{name}', null, null)")
        for name in ("metrics", "hourly", "a_daily", "a_second", "by_function"):
            query = f"select * from {name} order by 1"
            assert await target.fetch(query) == await source.fetch(query) != []
    finally:
        await source.close()


async def test_plain_server(source_database: str) -> None:
    connection = await asyncpg.connect(source_database)
    try:
        keys = await read_entries_of_timescale(connection)
        assert keys == EntriesOfTimescale(frozenset(), frozenset())
    finally:
        await connection.close()
