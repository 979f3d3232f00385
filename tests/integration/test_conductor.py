"""The conductor's parts against real servers: preparing, waiting for transactions, restoring a schema, cleaning."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from pydantic import SecretStr

from live_migration.common import state
from live_migration.common.control import CONFIG, ProducerConfig
from live_migration.common.errors import LiveMigrationError, SourceError, TargetError, UsageError
from live_migration.common.kafka import admin, read_control
from live_migration.common.local_postgres import LocalPostgres, postgres_binaries, wheel_binaries
from live_migration.common.postgres import session
from live_migration.common.settings import Settings, load_settings
from live_migration.common.state import Phase
from live_migration.coordinator import handover, steps, workers
from live_migration.coordinator.clean import clean
from live_migration.coordinator.conductor import conduct
from live_migration.coordinator.control_topic import producer_config
from live_migration.coordinator.cutover import request_cutover
from live_migration.coordinator.drift import find_drift, shape_differences
from live_migration.coordinator.entries import run_entries
from live_migration.coordinator.held import list_held
from live_migration.coordinator.identity_watch import move_lost
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.opening import open_migration
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.run import Run
from live_migration.coordinator.schema import read_post_data, restore_schema
from live_migration.coordinator.timescale_source import AUTO_PUBLICATION
from live_migration.producer.slot import SlotTimeout
from tests.fixtures.fix_postgres import SETTINGS, DatabaseFactory, PostgresFactory, make_certificate
from tests.support.rich_schema import RICH_SCHEMA

pytestmark = pytest.mark.integration

IDENTITIES = """
    create schema app;
    create table app.with_key (id int primary key, v int);
    create table app.deferrable_key (id int primary key deferrable initially deferred, v int);
    create table app.by_index (id int not null unique, v int);
    alter table app.by_index replica identity using index by_index_id_key;
    create table app.is_full (id int, v int);
    alter table app.is_full replica identity full;
    create table app.full_generated (id int, v int, w int generated always as (id * 2) stored);
    alter table app.full_generated replica identity full;
    create table app.no_identity (id int, v int);
    create table app.is_nothing (id int primary key, v int);
    alter table app.is_nothing replica identity nothing;
    create table app.index_dropped (id int not null unique, v int);
    alter table app.index_dropped replica identity using index index_dropped_id_key;
    alter table app.index_dropped drop constraint index_dropped_id_key;
    create table app.parts_key (id int primary key, v int) partition by range (id);
    create table app.parts_key_1 partition of app.parts_key for values from (0) to (1000);
    create table app.parts_none (id int, v int) partition by range (id);
    create table app.parts_none_1 partition of app.parts_none for values from (0) to (1000);
    create table app.parts_full (id int, v int) partition by range (id);
    alter table app.parts_full replica identity full;
    create table app.parts_full_1 partition of app.parts_full for values from (0) to (1000);
    create table app.parent (id int primary key, v int);
    create table app.child () inherits (app.parent);
    create unlogged table app.is_unlogged (id int primary key, v int);
"""
WRITTEN = [
    "with_key",
    "deferrable_key",
    "by_index",
    "is_full",
    "full_generated",
    "no_identity",
    "is_nothing",
    "index_dropped",
    "parts_key",
    "parts_none",
    "parts_full",
    "parent",
    "child",
    "is_unlogged",
]
INSERT_ONLY = {"deferrable_key", "no_identity", "is_nothing", "index_dropped", "parts_none_1", "parts_full_1", "child"}
ALL = {"with_key", "by_index", "is_full", "parts_key_1", "parent"}


class RecordingObserver:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.phases: list[Phase] = []
        self.told = asyncio.Event()

    def phase_changed(self, phase: Phase) -> None:
        self.phases.append(phase)

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.told.set()

    def warning(self, message: str) -> None:
        self.warnings.append(message)

    async def until_note(self, text: str) -> str:
        async with asyncio.timeout(30):
            while True:
                if found := [note for note in self.notes if text in note]:
                    return found[0]
                self.told.clear()
                await self.told.wait()


class Bench:
    """One migration's settings and databases, with a run of the conductor to call its phases on."""

    def __init__(self, settings: Settings, run: Run, observer: RecordingObserver) -> None:
        self.settings, self.run, self.observer = settings, run, observer

    async def source(self, query: str, *arguments: object) -> Any:
        return await fetch(self.settings.source_uri(), query, *arguments)

    async def target(self, query: str, *arguments: object) -> Any:
        return await fetch(self.settings.target_uri(), query, *arguments)


async def fetch(uri: str, query: str, *arguments: object) -> Any:
    connection = await asyncpg.connect(uri)
    try:
        if not arguments and not query.lstrip().lower().startswith("select"):
            return await connection.execute(query)
        return await connection.fetch(query, *arguments)
    finally:
        await connection.close()


MakeSettings = Callable[..., Settings]


@pytest.fixture
def make_settings(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> MakeSettings:
    def make(**options: object) -> Settings:
        given: dict[str, Any] = {
            "source": source_database, "target": target_database, "kafka": kafka_bootstrap, "name": unique_name,
            "dir": tmp_path / "data", "workers": False, "partitions": 3, "slot_timeout": 30.0, "lock_timeout": 0.5,
        }  # fmt: skip
        return load_settings({**given, **options})

    return make


@asynccontextmanager
async def bench(settings: Settings) -> AsyncIterator[Bench]:
    """Begin the migration, or resume it, as `conduct` does, and hold the coordinator's lease."""
    observer = RecordingObserver()
    reporter = Reporter(observer)
    opened = await open_migration(settings, reporter)
    assert opened is not None
    async with session(settings.target_uri(), "target") as keeper, session(settings.target_uri(), "target") as target:
        epoch = await state.acquire_coordinator_lease(keeper, "test", 60)
        run = Run(opened, reporter, target, epoch, await state.require_migration(target))
        try:
            yield Bench(opened, run, observer)
        finally:
            await state.release_coordinator_lease(keeper, epoch)


async def stand_in_for_consumers(settings: Settings) -> None:
    """Copy every planned table and build every planned index, as consumers do."""
    async with session(settings.source_uri(), "source") as source, session(settings.target_uri(), "target") as target:
        for row in await target.fetch("select statements from _live_migration.indexes order by is_primary desc, oid"):
            async with target.transaction():
                for statement in row["statements"]:
                    await target.execute(statement)
        await target.execute("update _live_migration.indexes set state = 'done'")
        await target.execute("update _live_migration.tables set state = 'ready'")
        assert await source.fetchval("select true")


async def published(bench: Bench, publication: str) -> set[str]:
    rows = await bench.source("select tablename from pg_publication_tables where pubname = $1", publication)
    return {row[0] for row in rows}


async def write_everywhere(uri: str, number: int) -> None:
    connection = await asyncpg.connect(uri)
    for table in WRITTEN:
        await connection.execute(f"insert into app.{table} (id, v) values ({number}, 1), ({number + 1}, 1)")
        assert await connection.execute(f"update app.{table} set v = v + 1 where id = {number}") == "UPDATE 1"
        assert await connection.execute(f"delete from app.{table} where id = {number + 1}") == "DELETE 1"
    await connection.close()


async def traces_on_source(settings: Settings) -> list[str]:
    rows = await fetch(
        settings.source_uri(),
        """select slot_name::text from pg_replication_slots where slot_name = $1
           union all select pubname::text from pg_publication where pubname in ($1, $1 || '_insert')""",
        settings.name,
    )
    return [row[0] for row in rows]


async def test_preparing_lets_update_and_delete_through_on_every_kind_of_table(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), IDENTITIES)
    async with bench(settings) as b:
        await prepare(b.run)
        await write_everywhere(settings.source_uri(), 10)
        assert await published(b, settings.publication) == ALL
        assert await published(b, settings.insert_publication) == INSERT_ONLY | {"full_generated"}
        warnings = "\n".join(b.observer.warnings)
        for table in (*INSERT_ONLY, "full_generated", "is_unlogged"):
            assert f"app.{table}" in warnings
        assert b.run.phase is Phase.SCHEMA
        config = ProducerConfig.model_validate_json((await read_control(settings))[CONFIG])
        assert config.start_lsn == b.run.migration.start_lsn
        assert config.binary
        assert config.publications == (settings.publication, settings.insert_publication)


async def test_full_with_a_generated_column_is_followed_before_18(
    make_settings: MakeSettings, postgres_server: PostgresFactory, fresh_database: DatabaseFactory
) -> None:
    settings = make_settings(source=await fresh_database(postgres_server(14)))
    await fetch(settings.source_uri(), IDENTITIES)
    async with bench(settings) as b:
        await prepare(b.run)
        await write_everywhere(settings.source_uri(), 10)
        assert await published(b, settings.publication) == ALL | {"full_generated"}
        await restore_schema(b.run)
    await clean(settings, prune=False, note=lambda _: None)


async def test_identities_are_made_full_on_request_and_given_back(make_settings: MakeSettings) -> None:
    settings = make_settings(replica_identity_full=True)
    await fetch(settings.source_uri(), IDENTITIES)
    identities = "select relname, relreplident::text as r from pg_class where relnamespace = 'app'::regnamespace and relkind = 'r'"
    before = {row["relname"]: row["r"] for row in await fetch(settings.source_uri(), identities)}
    async with bench(settings) as b:
        await prepare(b.run)
        await write_everywhere(settings.source_uri(), 10)
        assert await published(b, settings.publication) == ALL | INSERT_ONLY
        assert await published(b, settings.insert_publication) == {"full_generated"}
    await clean(settings, prune=False, note=lambda _: None)
    after = {row["relname"]: row["r"] for row in await fetch(settings.source_uri(), identities)}
    assert after == before | {"index_dropped": "n"}  # its index had been dropped, which is the same as nothing


async def test_slot_creation_names_the_transaction_it_waits_for(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), "create table t (id int primary key)")
    other = await asyncpg.connect(settings.source_uri(), server_settings={"application_name": "nightly report"})
    transaction = other.transaction()
    await transaction.start()
    await other.execute("insert into t values (1)")
    async with bench(settings) as b, asyncio.TaskGroup() as group:
        preparing = group.create_task(prepare(b.run))
        note = await b.observer.until_note("waits for open transactions")
        assert "nightly report" in note
        assert str(other.get_server_pid()) in note
        assert not preparing.done()
        await transaction.commit()
        await preparing
        assert b.run.phase is Phase.SCHEMA
    await other.close()


async def test_slot_creation_times_out_over_a_prepared_transaction_and_leaves_nothing(
    make_settings: MakeSettings, unique_name: str
) -> None:
    settings = make_settings(slot_timeout=1.0)
    await fetch(settings.source_uri(), "create table t (id int primary key)")
    other = await asyncpg.connect(settings.source_uri())
    await other.execute("begin")
    await other.execute("insert into t values (1)")
    await other.execute(f"prepare transaction '{unique_name}'")
    async with bench(settings) as b:
        with pytest.raises(SlotTimeout, match=unique_name):
            await prepare(b.run)
        assert await traces_on_source(settings) == []
        assert not await b.source("select 1 from pg_stat_activity where application_name = 'live-migration slot'")
        await other.execute(f"commit prepared '{unique_name}'")
    async with bench(settings) as again:
        await prepare(again.run)
        assert again.run.phase is Phase.SCHEMA
    await other.close()


async def test_slot_creation_that_times_out_gives_everything_back(make_settings: MakeSettings) -> None:
    """Jobs and the database's setting stand in the state as on a source with TimescaleDB; giving them back needs none."""
    settings = make_settings(slot_timeout=1.0, replica_identity_full=True)
    await fetch(settings.source_uri(), "create table t (id int); create table open (id int primary key)")
    database = settings.source_uri().rsplit("/", 1)[1]
    await fetch(settings.source_uri(), f"alter database {database} set {AUTO_PUBLICATION} = on")
    other = await asyncpg.connect(settings.source_uri())
    await other.execute("begin; insert into open values (1)")
    async with bench(settings) as b:
        await b.run.target.execute(
            """insert into _live_migration.source_changes (kind, oid, object, before, after)
               values ('database_setting', null, $1, '', 'on'), ('job', 1000, 'Retention Policy [1000]', 'true', 'false')""",
            AUTO_PUBLICATION,
        )
        with pytest.raises(SlotTimeout):
            await prepare(b.run)
        assert await list_held(settings) == []
        left = "select 1 from pg_db_role_setting s, pg_database d where d.oid = s.setdatabase and d.datname = current_database()"
        assert await b.source(left) == []
        assert any("job Retention Policy [1000]" in note for note in b.observer.notes)
    await other.close()


async def test_preparing_again_after_a_crash_makes_everything_anew(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), "create table t (id int primary key)")
    async with bench(settings) as b:
        await prepare(b.run)
        first = b.run.migration.start_lsn
        await b.target("update _live_migration.migration set phase = 'prepare'")
    await fetch(settings.source_uri(), "insert into t values (1)")
    async with bench(settings) as again:
        await prepare(again.run)
        assert again.run.migration.start_lsn is not None
        assert first is not None
        assert again.run.migration.start_lsn > first


async def test_preparing_refuses_a_slot_that_is_not_its_own(make_settings: MakeSettings) -> None:
    settings = make_settings()
    async with bench(settings) as b:
        await b.source("select pg_create_logical_replication_slot($1, 'pgoutput')", settings.name)
        with pytest.raises(SourceError, match=settings.name):
            await prepare(b.run)
        assert await traces_on_source(settings) == [settings.name]


async def test_preparing_gives_way_to_a_lock_and_comes_back(make_settings: MakeSettings) -> None:
    settings = make_settings(lock_timeout=0.1)
    await fetch(settings.source_uri(), "create table t (id int primary key)")
    other = await asyncpg.connect(settings.source_uri())
    async with bench(settings) as b, asyncio.TaskGroup() as group:
        await other.execute("begin; lock table t in access exclusive mode")
        preparing = group.create_task(prepare(b.run))
        await asyncio.sleep(1.0)  # several attempts
        assert not preparing.done()
        await other.execute("commit")
        await preparing
        assert await published(b, settings.publication) == {"t"}
    await other.close()


@pytest.mark.parametrize("version", [14, 18])
async def test_a_rich_schema_arrives_whole(
    version: int,
    make_settings: MakeSettings,
    postgres_server: PostgresFactory,
    source_server: LocalPostgres,
    target_server: LocalPostgres,
    fresh_database: DatabaseFactory,
) -> None:
    # The wheel's server 18 has the extensions' files; the target is of the same version, so that both dumps read alike.
    server = source_server if version == 18 else postgres_server(version)
    target = target_server if version == 18 else server
    settings = make_settings(source=await fresh_database(server), target=await fresh_database(target))
    await fetch(settings.source_uri(), RICH_SCHEMA)
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        assert b.run.phase is Phase.COPY
        assert not await b.target(
            """select tgname::text from pg_trigger where not tgisinternal
               union all select conname::text from pg_constraint
                         where contype = 'f' and connamespace <> '_live_migration'::regnamespace
               union all select polname::text from pg_policy"""
        )
        await stand_in_for_consumers(settings)
        post_data = await read_post_data(b.run)
        await run_entries(b.run, "partitioned indexes", post_data.partitioned)
        assert not await b.target("select indexrelid::regclass from pg_index where not indisvalid")
        async with b.run.source_session("test") as source:
            assert not await shape_differences(b.run, source, b.run.target)
            await handover.hand_over(b.run, source)
        await b.target("update _live_migration.migration set phase = 'done'")
        await b.run.reload()
        await handover.finish_after_handover(b.run)
        assert await b.target("select count(*) as n from app.unlog") == [(1000,)]
        assert await b.target("select last_value, is_called from app.seq") == [(5, True)]
    await clean(settings, prune=False, note=lambda _: None)
    assert schema_of(settings.target_uri()) == schema_of(settings.source_uri())


async def test_what_follows_the_hand_over_needs_no_source(make_settings: MakeSettings) -> None:
    """It may be switched off by then, and somebody must run `migrate` again to have the rest done."""
    settings, observer = make_settings(), RecordingObserver()
    async with bench(settings) as b:
        await b.target("update _live_migration.migration set phase = 'done'")
    off = settings.model_copy(update={"source": SecretStr("postgresql://nobody@127.0.0.1:1/none")})
    await conduct(off, stop=asyncio.Event(), ask_cutover=asyncio.Event(), observer=observer)
    async with session(settings.target_uri(), "target") as target:
        assert await handover.is_finished(target)


def schema_of(uri: str) -> list[str]:
    """Give pg_dump's whole view of a schema, without what differs from run to run."""
    arguments = [str(wheel_binaries() / "pg_dump"), "--schema-only", "--no-owner", "--no-privileges", f"--dbname={uri}"]
    dumped = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    return [
        line for line in dumped.splitlines() if not line.startswith(("\\restrict", "\\unrestrict", "-- Name: public;"))
    ]


async def test_the_schema_phase_goes_on_after_a_failure(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(
        settings.source_uri(), "create schema a; create table a.t1 (id int primary key); create table a.t2 (id int)"
    )
    async with bench(settings) as b:
        await prepare(b.run)
        await b.target("create schema a; create table a.t2 (other text)")
        with pytest.raises(TargetError, match=r"table a\.t2"):
            await restore_schema(b.run)
        assert b.run.phase is Phase.SCHEMA
    await fetch(settings.target_uri(), "drop table a.t2")
    async with bench(settings) as again:
        await restore_schema(again.run)
        assert again.run.phase is Phase.COPY
        rows = await again.target(
            "select count(*) as n from pg_class where relnamespace = 'a'::regnamespace and relkind = 'r'"
        )
        assert rows == [(2,)]


async def test_a_table_made_before_the_plan_is_published_and_planned(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), "create table t1 (id int primary key)")
    async with bench(settings) as b:
        await prepare(b.run)
        await b.source("create table t2 (id int primary key)")
        await restore_schema(b.run)
        assert await published(b, settings.publication) == {"t1", "t2"}
        assert await b.target("select table_name from _live_migration.tables order by 1") == [("t1",), ("t2",)]
        assert b.run.migration.publication_change == 1
        config = ProducerConfig.model_validate_json((await read_control(settings))[CONFIG])
        assert config.publication_change == 1


async def test_a_table_that_loses_its_identity_leaves_the_publication(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), "create table t (id int primary key, v int); insert into t values (1, 1)")
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await b.source("alter table t drop constraint t_pkey")
        with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError):
            await b.source("update t set v = 2")
        async with b.run.source_session("test") as source, b.run.target_session("test") as target:
            await move_lost(b.run, source, target)
        await b.source("update t set v = 2")
        assert "public.t has lost its replica identity" in b.observer.warnings[-1]
        assert await b.target("select publication, copy_again from _live_migration.tables") == [("insert", True)]
        await b.source("insert into t values (2, 2)")
        async with b.run.source_session("test") as source:
            await handover.copy_outside_stream(b.run, source)
        assert await b.target("select id, v from public.t order by 1") == [(1, 2), (2, 2)]


async def test_drift_is_seen_by_oid(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(
        settings.source_uri(), "create table a (id int primary key); create table b (id int); create table c (id int)"
    )
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await b.source(
            "alter table a rename to z; create table a (id int); drop table c; alter table b add column v text"
        )
        async with b.run.source_session("test") as source:
            drift = await find_drift(b.run, source, b.run.target)
            differences = "\n".join(await shape_differences(b.run, source, b.run.target))
        assert drift.created == ("public.a",)
        assert drift.renamed == ("public.a to public.z",)
        assert drift.dropped == ("public.c",)
        assert "public.b has columns ['v text'] on the source alone" in differences


GENERATED = """
    create table listed (id int, kind varchar(9), g bool generated always as (kind in ('a', 'b')) stored);
    create table dated (at date, "the year" int generated always as (extract(year from at)::int) stored);
    create table root (id int, v int, g int generated always as (v + 1) stored) partition by range (id);
    create table leaf partition of root for values from (0) to (10);
    create table cast_ (v int, g text generated always as (v::text || '!') stored);
"""
OTHERWISE = """
    alter table listed drop g, add g bool generated always as (kind in ('b', 'c')) stored;
    alter table root drop g, add g int generated always as (v + 100) stored;
"""


@pytest.mark.parametrize(("source_version", "target_version"), [(14, 14), (14, 18), (18, 18)])
async def test_generated_columns_are_compared_by_what_the_target_makes_of_them(
    source_version: int,
    target_version: int,
    make_settings: MakeSettings,
    postgres_server: PostgresFactory,
    fresh_database: DatabaseFactory,
) -> None:
    source, target = postgres_server(source_version), postgres_server(target_version)
    settings = make_settings(source=await fresh_database(source), target=await fresh_database(target))
    await fetch(settings.source_uri(), GENERATED)
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        async with b.run.source_session("test") as session:
            assert not await shape_differences(b.run, session, b.run.target)
            await b.source(OTHERWISE)
            named = await shape_differences(b.run, session, b.run.target)
            assert [line.split(":")[0] for line in named] == ["public.listed", "public.root"]
            for statement in re.findall("ALTER TABLE .*;", "\n".join(named)):
                await b.target(statement)
            assert not await shape_differences(b.run, session, b.run.target)
            await b.target("alter table root drop g, add g int generated always as (v + 101) stored")
            assert len(await shape_differences(b.run, session, b.run.target)) == 1
            await b.target(OTHERWISE)
            assert not await shape_differences(b.run, session, b.run.target)
        assert not await b.target("select relname from pg_class where relname = 'lm_probe'")


async def test_large_objects_arrive_with_their_oids(make_settings: MakeSettings) -> None:
    settings = make_settings()
    big = b"\x00\x01\xff" * 200_000
    await fetch(
        settings.source_uri(), "select lo_from_bytea(o::oid, '\\xab'::bytea) from generate_series(100000, 100199) o"
    )
    await fetch(settings.source_uri(), "select lo_from_bytea(500000, $1)", big)
    async with bench(settings) as b, b.run.source_session("test") as source:
        await handover.copy_large_objects(b.run, source)
        assert await steps.progress(b.run.target, "large objects") == 500000
        assert await b.target("select count(*) as n from pg_largeobject_metadata") == [(201,)]
        assert (await b.target("select lo_get(500000) as content"))[0]["content"] == big


async def test_clean_leaves_no_trace(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), IDENTITIES)
    catalog = """select 'class', relname::text from pg_class where oid >= 16384 union all select 'namespace', nspname::text from pg_namespace
                 union all select 'publication', pubname::text from pg_publication order by 1, 2"""
    before = await fetch(settings.source_uri(), catalog)
    async with bench(settings) as b:
        await prepare(b.run)
        with pytest.raises(TargetError, match="is being run by test"):
            await clean(settings, prune=False, note=lambda _: None)
        assert await traces_on_source(settings) != []
    said: list[str] = []
    await clean(settings, prune=True, note=said.append)
    assert await traces_on_source(settings) == []
    assert await fetch(settings.source_uri(), catalog) == before
    assert not await fetch(settings.target_uri(), "select 1 from pg_namespace where nspname = '_live_migration'")
    async with admin(settings) as client:
        assert not [topic for topic in await client.list_topics() if topic.startswith(settings.name)]
    assert not settings.dir.exists()
    await clean(settings, prune=True, note=said.append)  # nothing is left, and that is no error


async def test_a_cutover_is_asked_for_only_while_a_coordinator_is_alive(make_settings: MakeSettings) -> None:
    settings = make_settings()
    with pytest.raises(TargetError, match="no migration"):
        await request_cutover(settings)
    async with bench(settings):
        assert "asked for the cutover" in await request_cutover(settings)
        await request_cutover(settings)
        rows = await fetch(settings.target_uri(), "select count(*) as n from _live_migration.requests")
        assert rows == [(1,)]
    with pytest.raises(TargetError, match="no coordinator"):
        await request_cutover(settings, patience=0)


async def test_conduct_stops_keeps_its_state_and_resumes(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), "create table t (id int primary key)")
    async with AsyncExitStack():
        observer, stop = RecordingObserver(), asyncio.Event()
        conducting = asyncio.ensure_future(conduct(settings, stop=stop, ask_cutover=asyncio.Event(), observer=observer))
        async with asyncio.timeout(60):
            while Phase.COPY not in observer.phases:
                assert not conducting.done(), conducting.exception()
                await asyncio.sleep(0.05)
        second = RecordingObserver()
        with pytest.raises(TargetError, match="already being run"):
            await conduct(
                settings.model_copy(update={"kafka": "127.0.0.1:1"}),
                stop=asyncio.Event(),
                ask_cutover=asyncio.Event(),
                observer=second,
            )
        # Who is refused has changed nothing that the consumers read.
        assert await fetch(settings.target_uri(), "select kafka from _live_migration.migration") == [(settings.kafka,)]
        stop.set()
        await conducting
        assert observer.phases == [Phase.PREPARE, Phase.SCHEMA, Phase.COPY]
        assert any(settings.name in note and "still held" in note for note in observer.notes)
        with pytest.raises(TargetError, match="another migration"):
            await conduct(
                settings.model_copy(update={"name": "other"}),
                stop=asyncio.Event(),
                ask_cutover=asyncio.Event(),
                observer=second,
            )
        stop.clear()
        resumed = RecordingObserver()
        conducting = asyncio.ensure_future(conduct(settings, stop=stop, ask_cutover=asyncio.Event(), observer=resumed))
        await resumed.until_note("going on in phase copy")
        stop.set()
        await conducting


async def test_bad_input_is_one_error_before_anything_is_touched(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), "create table t (id int primary key)")
    await fetch(settings.target_uri(), "create table t (id int primary key)")
    with pytest.raises(LiveMigrationError):
        await conduct(settings, stop=asyncio.Event(), ask_cutover=asyncio.Event(), observer=RecordingObserver())
    assert await traces_on_source(settings) == []
    assert not await fetch(settings.target_uri(), "select 1 from pg_namespace where nspname = '_live_migration'")


async def test_the_schema_comes_over_tls_with_a_password(make_settings: MakeSettings) -> None:
    async with LocalPostgres(server_bin=postgres_binaries(17), settings=SETTINGS, password="p@ss:w\\rd") as server:
        await server.restart(settings=make_certificate(server))
        settings = make_settings(source=f"{server.uri()}?sslmode=require")
        await fetch(settings.source_uri(), "create table t (id int primary key)")
        async with bench(settings) as b:
            await prepare(b.run)
            await restore_schema(b.run)
            assert b.run.phase is Phase.COPY
        await clean(settings, prune=True, note=lambda _: None)


async def test_a_worker_that_dies_again_and_again_ends_the_run_with_its_log(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        workers, "worker_command", lambda kind: [sys.executable, "-c", f"print('no luck for the {kind}'); exit(3)"]
    )
    monkeypatch.setattr(workers, "_FIRST_PAUSE_SECONDS", 0.01)
    observer = RecordingObserver()
    async with workers.WorkerPool(make_settings(workers=True), Reporter(observer)) as pool:
        await pool.start()
        with pytest.raises(workers.WorkerFailed, match="no luck for the"):
            async with asyncio.timeout(60):
                await pool.watch(_true)
    assert any("ended with code 3" in warning for warning in observer.warnings)


async def _true() -> bool:
    return True


async def test_workers_are_asked_to_end_and_get_their_settings_by_environment_alone(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, signal, sys, time; "
        "signal.signal(signal.SIGTERM, lambda *_: (print('drained', flush=True), sys.exit(0))); "
        "print(os.environ['LIVE_MIGRATION_SOURCE'], flush=True); time.sleep(600)"
    )
    monkeypatch.setattr(workers, "worker_command", lambda kind: [sys.executable, "-c", program])
    settings = make_settings(workers=True)
    log = settings.dir / "logs" / "producer.log"
    async with workers.WorkerPool(settings, Reporter(RecordingObserver())) as pool:
        await pool.start()
        async with asyncio.timeout(30):
            while not log.exists() or not log.read_text():
                await asyncio.sleep(0.02)
        children = psutil.Process().children(recursive=True)
        assert not [child for child in children if settings.source_uri() in " ".join(child.cmdline())]
    assert log.read_text().splitlines() == [settings.source_uri(), "drained"]
    assert not [
        child for child in children if child.is_running() and "LIVE_MIGRATION_SOURCE" in " ".join(child.cmdline())
    ]


async def test_lanes_of_a_table_are_fixed_when_a_migration_begins(make_settings: MakeSettings) -> None:
    settings = make_settings(lanes=("public.hot=4",))
    await fetch(settings.source_uri(), "create table public.hot (id int primary key)")
    async with bench(settings) as b:
        assert b.run.migration.lane_count == 7
        assert b.run.migration.lane_map == settings.lane_map
        await prepare(b.run)
        config = producer_config(b.run.settings, b.run.migration)
        assert (config.lane_count, config.lane_map) == (7, settings.lane_map)
    for again in (make_settings(), make_settings(lanes=("hot=4",), partitions=5)):
        async with bench(again) as b:
            assert b.settings.lane_map == settings.lane_map
    for other in (("hot=2",), ("hot=4", "cold=2")):
        with pytest.raises(UsageError, match=r"begun with --lanes public\.hot=4"):
            await open_migration(make_settings(lanes=other), Reporter(RecordingObserver()))


async def test_a_table_that_cannot_be_split_is_refused_before_anything_is_touched(make_settings: MakeSettings) -> None:
    settings = make_settings(lanes=("hot=2",))
    await fetch(settings.source_uri(), "create table public.hot (id numeric primary key)")
    with pytest.raises(LiveMigrationError, match=r"public.hot cannot have several lanes: .*id \(numeric\)"):
        await open_migration(settings, Reporter(RecordingObserver()))
    assert await fetch(settings.target_uri(), "select to_regnamespace('_live_migration')") == [(None,)]
    assert await traces_on_source(settings) == []
