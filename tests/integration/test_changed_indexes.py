"""Indexes that cannot be made as they were planned, because the source has them otherwise by the time they are built."""

from __future__ import annotations

import asyncio

import pytest

from live_migration.common.state import Phase
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.schema import restore_schema
from live_migration.coordinator.waiting import await_copy
from tests.integration.test_conductor import MakeSettings, bench, fetch, make_settings
from tests.support.copying import consumers, fetch_value, index_definitions, plan, run_sql, settings_for, until_ready

__all__ = ["make_settings"]

pytestmark = pytest.mark.integration

TABLE = "create table public.t (id int not null, v int, w text); create table public.other (id int not null);"
EVENTS = "select string_agg(message, ' ') from _live_migration.events"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("live_migration.consumer.copy_errors.REFUSED_RETRY_SECONDS", 0.5)
    monkeypatch.setattr("live_migration.consumer.index_builder.ERROR_RETRY_SECONDS", 0.5)


async def copy_after(source: str, target: str, indexes: str, *, on_source: str, on_target: str) -> None:
    for uri in (source, target):
        await run_sql(uri, TABLE)
    await run_sql(source, f"insert into public.t select g, g, g from generate_series(1, 50) g; {indexes}")
    await plan(source, target)
    await run_sql(source, on_source)
    await run_sql(target, on_target)
    async with consumers(settings_for(source, target)):
        await until_ready(target)


@pytest.mark.parametrize(
    "indexes",
    [
        "alter table public.t add primary key (id)",
        "create unique index t_id on public.t (id)",
        "alter table public.t add constraint k unique (id) include (w) deferrable initially deferred; alter index public.k set (fillfactor = 70)",
        "create index t_e on public.t ((id + 1)); alter index public.t_e alter column 1 set statistics 77; alter table public.t cluster on t_e",
        "alter table public.t add constraint x exclude using btree (id with =)",
    ],
)
async def test_an_index_on_a_column_that_has_another_name_by_now_is_built(
    source_database: str, target_database: str, indexes: str
) -> None:
    rename = "alter table public.t rename id to uid"
    await copy_after(source_database, target_database, indexes, on_source=rename, on_target=rename)
    assert await index_definitions(target_database) == await index_definitions(source_database)
    more = """select string_agg(concat_ws(' ', indexrelid::regclass, indisclustered, indisreplident, condeferrable, attstattarget, reloptions), ';')
              from pg_index i join pg_class c on c.oid = indexrelid join pg_attribute a on a.attrelid = c.oid left join pg_constraint on conindid = indexrelid
              where indrelid = 'public.t'::regclass"""
    assert await fetch_value(target_database, more) == await fetch_value(source_database, more)


async def test_it_keeps_the_name_that_the_rest_of_the_plan_knows(source_database: str, target_database: str) -> None:
    rename = "alter table public.t rename v to vv"
    await copy_after(
        source_database,
        target_database,
        "create index t_v on public.t (v); alter table public.t replica identity full",
        on_source=f"{rename}; alter index public.t_v rename to t_vv",
        on_target=rename,
    )
    (definition,) = await index_definitions(target_database)
    assert definition == "CREATE INDEX t_v ON public.t USING btree (vv)"


async def test_one_that_was_made_anew_by_alter_type_is_built_as_it_is_now(
    source_database: str, target_database: str
) -> None:
    alter = "alter table public.t alter w type int using w::int"
    await copy_after(
        source_database,
        target_database,
        "create index t_w on public.t (w) where w <> 'x'",
        on_source=f"drop index public.t_w; {alter}; create index t_w on public.t (w) where w <> 3",
        on_target=alter,
    )
    assert await index_definitions(target_database) == await index_definitions(source_database)


@pytest.mark.parametrize(
    ("on_source", "on_target"),
    [
        ("alter table public.t drop column v", "alter table public.t drop column v"),
        ("drop index public.t_v; insert into public.t values (1, 1, 'twice')", "select true"),
    ],
)
async def test_one_that_is_gone_from_the_source_is_left_out_and_named(
    source_database: str, target_database: str, on_source: str, on_target: str
) -> None:
    await copy_after(
        source_database,
        target_database,
        "create unique index t_v on public.t (v); create index t_w on public.t (w)",
        on_source=on_source,
        on_target=on_target,
    )
    assert await index_definitions(target_database) == await index_definitions(source_database)
    assert "index t_v of public.t is left out" in await fetch_value(target_database, EVENTS)


async def test_a_database_without_the_table_tells_nothing_of_its_indexes(
    source_database: str, target_database: str
) -> None:
    """SOURCE may lead elsewhere for a while: what is not there is not gone."""
    for uri in (source_database, target_database):
        await run_sql(uri, TABLE)
    await run_sql(source_database, "create unique index t_v on public.t (v)")
    await plan(source_database, target_database)
    await run_sql(
        target_database,
        "update _live_migration.tables set state = case table_name when 't' then 'copied' else 'ready' end;"
        "insert into public.t values (1, 1, 'x'), (2, 1, 'x')",
    )
    await run_sql(source_database, "drop table public.t")
    async with consumers(settings_for(source_database, target_database)):
        async with asyncio.timeout(30):
            while not (said := await fetch_value(target_database, "select error from _live_migration.indexes")):
                await asyncio.sleep(0.03)
    assert "23505" in said
    assert await fetch_value(target_database, "select state from _live_migration.indexes") == "pending"


PARTITIONED = """
    create table m (id int, k int, v int, primary key (id, k)) partition by list (k);
    create table m1 partition of m for values in (1);
    create table m2 partition of m for values in (2);
    create index m_v on m (v); create index m_kv on m (k, v)
"""
INDEXES = """select i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid), h.inhparent::regclass::text, i.indisvalid
             from pg_index i left join pg_inherits h on h.inhrelid = i.indexrelid where i.indrelid::regclass::text ~ '^m' order by 1"""


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ("alter table m rename id to uid; alter table m rename v to vv", []),
        ("alter table m drop column v", ["m_v", "m_kv"]),
    ],
)
async def test_indexes_of_a_partitioned_root_are_put_together_as_the_source_has_them_now(
    make_settings: MakeSettings, changes: str, left_out: list[str]
) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), PARTITIONED)
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await b.source(changes)
        await b.target(changes)
        async with consumers(settings), asyncio.timeout(60):
            await await_copy(b.run)
        assert b.run.phase is Phase.REPLAY
        assert await b.target(INDEXES) == await b.source(INDEXES)
        for name in left_out:
            assert [line for line in b.observer.warnings if f"index public.{name} " in line]
