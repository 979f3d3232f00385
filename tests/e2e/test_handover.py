"""What the handover must bring unchanged, and what may stand in its way: event triggers, rights, late writers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.common.errors import ConnectionLost
from live_migration.coordinator import conductor
from live_migration.coordinator.clean import clean
from live_migration.coordinator.run import Run
from tests.e2e.migration import Migration

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

GUARDED = """
    create table parent (id int primary key, v text);
    create table child (id int primary key, parent int references parent, self int);
    alter table child add constraint to_self foreign key (self) references child deferrable initially deferred;
    insert into parent select i, 'p' from generate_series(1, 100) i;
    insert into child select i, i, i from generate_series(1, 100) i;
    insert into child values (1000, null, null);
    alter table child add orphan int default 7;
    alter table child add constraint orphans foreign key (orphan) references parent not valid;
    set session_replication_role = replica; update child set orphan = 5000 where id = 1000; reset session_replication_role;
    create function touch() returns trigger language plpgsql as 'begin return new; end';
    create trigger is_plain before update on child for each row execute function touch();
    create trigger is_disabled before update on child for each row execute function touch();
    alter table child disable trigger is_disabled;
    create trigger is_replica before update on child for each row execute function touch();
    alter table child enable replica trigger is_replica;
    create trigger is_always before update on child for each row execute function touch();
    alter table child enable always trigger is_always;
    create rule is_off as on delete to parent do also nothing; alter table parent disable rule is_off;
    create materialized view first as select count(*) as n from child;
    create materialized view second as select n + 1 as n from first;
    create materialized view by_key as select p.id, p.v, count(*) as n from parent p group by p.id;
    create unique index by_key_id on by_key (id);
    create view view_by_key as select p.id, p.v, count(*) as n from parent p group by p.id;
    create function refuse() returns event_trigger language plpgsql as $$ begin raise exception 'no DDL here: %', tg_tag; end $$;
    create event trigger aa_refuse on ddl_command_start when tag in ('ALTER TABLE', 'REFRESH MATERIALIZED VIEW')
        execute function refuse();
    create event trigger bb_off on ddl_command_start execute function refuse();
    alter event trigger bb_off disable;
    create event trigger cc_always on sql_drop when tag in ('DROP TABLE') execute function refuse();
    alter event trigger cc_always enable always;
"""
UNCHANGED = (
    """select conname::text, conrelid::regclass::text, convalidated, condeferrable, condeferred, pg_get_constraintdef(oid)
       from pg_constraint where connamespace = 'public'::regnamespace order by 2, 1""",
    "select tgname::text, tgenabled::text from pg_trigger where not tgisinternal order by 1",
    "select evtname::text, evtenabled::text from pg_event_trigger order by 1",
    "select rulename::text, ev_enabled::text from pg_rewrite where rulename = 'is_off'",
    "select matviewname::text, ispopulated from pg_matviews order by 1",
    "select * from second",
    "select * from by_key order by 1",
    "select pg_get_viewdef('view_by_key'::regclass)",
)


async def rows(uri: str, query: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(uri)
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


async def test_event_triggers_that_refuse_everything_do_not_spoil_the_end(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    for statement in GUARDED.rstrip().split(";\n"):  # each a transaction of its own
        await source.execute(statement)
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path)
    async with migration:
        await migration.until_phase("replay")
        await migration.finish()
    for query in UNCHANGED:
        assert await rows(target_database, query) == await rows(source_database, query), query
    assert not [line for line in migration.observer.warnings if "materialized" in line or "foreign key" in line]
    await source.close()


async def test_full_identities_are_not_left_on_the_target(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(
        """create table no_key (v int); create table is_nothing (v int); alter table is_nothing replica identity nothing;
           create table is_full (v int); alter table is_full replica identity full"""
    )
    identities = "select relname::text, relreplident::text from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace order by 1"
    before = await rows(source_database, identities)
    migration = Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, replica_identity_full=True
    )
    async with migration:
        await migration.until_phase("replay")
        await source.execute("insert into no_key values (1), (2); update no_key set v = 3 where v = 2")
        await migration.finish()
    assert await rows(target_database, "select v from no_key order by 1") == [(1,), (3,)]
    assert await rows(target_database, identities) == before
    await clean(migration.settings, prune=False, note=print)
    assert await rows(source_database, identities) == before
    await source.close()


@pytest.mark.parametrize("partitions", [1, 3])
async def test_a_write_after_the_last_barrier_is_never_silent(
    partitions: int, source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(
        """create table t (id int primary key); create table u (id int primary key); create table v (id int primary key);
           create unlogged table w (id bigint generated always as identity);
           create function slow() returns int language sql as 'select 1 from pg_catalog.pg_sleep(2)';
           create materialized view m as select slow() as n"""
    )
    migration = Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=partitions, cutover="auto"
    )
    async with migration:
        await migration.until(
            "the handover",
            "select is_done from _live_migration.steps where name = 'sequences'",
        )
        # One transaction that touches every lane, and time enough for the consumers to apply it.
        await source.execute("insert into t values (1); insert into u values (1); insert into v values (1)")
        await source.execute("insert into w default values")  # in no stream
        await migration.consumers[0].crash()
        migration.consumers[0].start()
        for i in range(30):
            await source.execute(f"create table x{i} (id int)")
        await migration.finish()
    assert [line for line in migration.observer.warnings if "after the last barrier" in line]
    assert [
        line
        for line in migration.observer.warnings
        if "sequences of the source went on" in line and "public.w_id_seq" in line
    ]
    # What the hand-over copies is a lane's business no more, whoever takes it: both would copy it.
    assert await rows(target_database, "select * from t union all select * from u union all select * from v") == []
    await source.close()


@pytest.mark.parametrize("has_replica_role", [True, False])
async def test_roles_that_are_no_superusers_migrate(
    has_replica_role: bool,
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """Without the right to session_replication_role, too: no trigger of the source's is there before the last barrier."""
    role, uris = f"role_{unique_name}", []
    for uri, attributes in ((source_database, "replication"), (target_database, "")):
        admin = await asyncpg.connect(uri)
        await admin.execute(f"create role {role} login {attributes} password 'pw'")
        await admin.execute(f"alter database {uri.rsplit('/', 1)[1]} owner to {role}")
        await admin.execute(f"alter schema public owner to {role}")
        if not attributes and has_replica_role:
            await admin.execute(f"grant set on parameter session_replication_role to {role}")
        await admin.close()
        uris.append(uri.replace("postgres@", f"{role}:pw@"))
    source = await asyncpg.connect(uris[0])
    await source.execute(
        """create table t (id int primary key, v text); insert into t select i, 'v' from generate_series(1, 1000) i;
           create table lost (id int primary key, v text); insert into lost values (1, 'v');
           create table child (id int primary key, t int references t); insert into child select i, i from generate_series(1, 100) i;
           create unlogged table cache (id int primary key); insert into cache select generate_series(1, 100);
           create sequence s; select nextval('s'); select lo_from_bytea(0, 'large');
           create materialized view m as select count(*) from t;
           create function never() returns trigger language plpgsql as $$begin raise 'fired'; end$$;
           create trigger never before update or delete on child for each row execute function never()"""
    )
    try:
        async with Migration(uris[0], uris[1], kafka_bootstrap, unique_name, tmp_path, part_size=16384) as migration:
            await migration.until_phase("replay")
            await source.execute("update t set v = 'w' where id < 10")
            await source.execute("alter table lost drop constraint lost_pkey")
            await migration.until(
                "a second copy is planned", "select count(*) from _live_migration.tables where copy_again"
            )
            await source.execute("alter table lost add primary key (id)")
            await migration.finish()
        for query in (
            "select * from t order by 1", "select * from cache order by 1", "select * from child order by 1",
            "select last_value, is_called from s", "select * from m", "select lo_get(oid) from pg_largeobject_metadata",
        ):  # fmt: skip
            assert await rows(uris[1], query) == await rows(uris[0], query)
        await clean(migration.settings, prune=False, note=print)
    finally:
        await source.close()
        for uri in (source_database, target_database):
            admin = await asyncpg.connect(uri)
            await admin.execute(f"reassign owned by {role} to postgres; drop owned by {role}; drop role {role}")
            await admin.close()


async def test_a_source_made_read_only_to_stop_its_writers_is_cut_over_and_cleaned(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(
        "create table t (id int primary key); insert into t select generate_series(1, 1000); create table no_key (v int)"
    )
    for uri in (source_database, target_database):
        admin = await asyncpg.connect(uri)
        await admin.execute(
            f"alter database {uri.rsplit('/', 1)[1]} set default_transaction_isolation = 'serializable'"
        )
        await admin.close()
    migration = Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, replica_identity_full=True
    )
    async with migration:
        await migration.until_phase("replay")
        await source.execute(
            f"alter database {source_database.rsplit('/', 1)[1]} set default_transaction_read_only = on"
        )
        await source.execute("update t set id = -id")
        await migration.consumers[0].crash()
        await migration.producer.crash()
        migration.consumers[0].start()
        migration.producer.start()
        await migration.finish()
    assert await rows(target_database, "select min(id), max(id) from t") == [(-1000, -1)]
    await clean(migration.settings, prune=False, note=print)
    assert await rows(source_database, "select pubname from pg_publication") == []
    assert await rows(source_database, "select relreplident::text from pg_class where relname = 'no_key'") == [("d",)]
    await source.close()


async def test_each_transaction_of_the_conductor_may_fail_and_each_answer_be_lost(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = await asyncpg.connect(source_database)
    for statement in GUARDED.rstrip().split(";\n"):
        await source.execute(statement)
    await source.execute(
        """alter event trigger aa_refuse disable; create unlogged table cache (id int); insert into cache select generate_series(1, 100);
           create sequence s; select setval('s', 50, false); create table no_key (v int); insert into no_key values (1);
           select lo_from_bytea(0, convert_to(repeat('large', 100000), 'UTF8')) from generate_series(1, 100)"""
    )
    transaction, chance, broken = Run.target_transaction, random.Random(5), 0

    @asynccontextmanager
    async def failing(run: Run, doing: str) -> AsyncIterator[asyncpg.Connection]:
        nonlocal broken
        drawn = chance.random()
        broken += drawn < 0.5
        async with transaction(run, doing) as target:
            yield target
            if drawn < 0.25:
                raise ConnectionLost(f"{doing}: broken before the commit")
        if drawn < 0.5:
            raise ConnectionLost(f"{doing}: broken after the commit")

    monkeypatch.setattr(Run, "target_transaction", failing)
    monkeypatch.setattr(conductor, "_FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(conductor, "_LONGEST_PAUSE_SECONDS", 0.05)
    migration = Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, replica_identity_full=True
    )
    async with migration:
        await migration.until_phase("replay")
        await source.execute("update no_key set v = 2")
        await migration.finish()
    assert broken > 10
    for query in (
        *UNCHANGED, "select * from cache order by 1", "select last_value, is_called from s", "select * from no_key",
        "select * from child order by id", "select oid, md5(lo_get(oid)) from pg_largeobject_metadata order by 1",
    ):  # fmt: skip
        assert await rows(target_database, query) == await rows(source_database, query), query
    await source.close()


async def test_two_migrations_of_one_source_do_not_meet(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    target_server: Any,
    fresh_database: Any,
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute("create table t (id int primary key); insert into t select generate_series(1, 100)")
    other = await fresh_database(target_server)
    name = f"{unique_name}_b"
    one = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "a")
    two = Migration(source_database, other, kafka_bootstrap, name, tmp_path / "b")
    async with one, two:
        await asyncio.gather(one.until_phase("replay"), two.until_phase("replay"))
        await source.execute("insert into t select generate_series(101, 200)")
        await one.finish()
        await source.execute("insert into t select generate_series(201, 300)")
        await two.finish()
    assert await rows(target_database, "select count(*) from t") == [(200,)]
    assert await rows(other, "select count(*) from t") == [(300,)]
    for uri in (target_database, other):
        assert await rows(uri, "select pubname from pg_publication") == []
    await clean(one.settings, prune=False, note=print)
    assert await rows(source_database, "select pubname::text from pg_publication order by 1") == [
        (name,),
        (f"{name}_insert",),
    ]
    await clean(two.settings, prune=False, note=print)
    await source.close()
