"""DDL on the source while changes are replayed, in a whole migration: the cutover names what is not brought, and brings what it can."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator.cutover import CutoverRefused
from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration
from tests.e2e.test_handover import rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SAME = (
    "select indexrelid::regclass::text from pg_index where indrelid = 't'::regclass order by 1",
    "select conname::text, pg_get_constraintdef(oid), convalidated from pg_constraint where conrelid = 't'::regclass order by 1",
    "select tgname::text from pg_trigger where not tgisinternal",
    "select x from vw",
    "select seqincrement, seqtypid::regtype::text from pg_sequence where seqrelid = 's'::regclass",
    "select attname::text, atthasdef, attnotnull from pg_attribute where attrelid = 't'::regclass and attnum > 0 order by 1",
    "select relrowsecurity from pg_class where relname = 't'",
    "select * from t order by 1",
)


async def test_ddl_on_the_source_is_brought_or_refuses_the_cutover(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = await asyncpg.connect(source_database), await asyncpg.connect(target_database)
    await source.execute(
        """create table p (id int primary key); create table t (id int primary key, v int, w int references p);
           create sequence s; create function f() returns trigger language plpgsql as 'begin return new; end';
           create view vw as select 1 as x; insert into p values (1), (2); insert into t values (1, 1, 1)"""
    )
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        rename = "alter table t rename w to parent"
        await source.execute(rename)
        await target.execute(rename)
        await source.execute(
            """create unique index u on t (v); alter table t alter v set default 7; alter table t alter v set not null;
               alter table t add constraint c check (parent < 100); alter table t add constraint again foreign key (v) references p not valid;
               create trigger g before insert on t for each row execute function f();
               create or replace view vw as select 2 as x; alter sequence s as bigint increment by 50;
               alter table t enable row level security"""
        )
        await source.execute("select nextval('s'); insert into t values (2, 2, 1)")
        with pytest.raises(CutoverRefused) as refused:
            await migration.finish()
        for name in ("index u of public.t", "constraint c of public.t", "column v of public.t", "view public.vw"):
            assert name in refused.value.message
        for name in ("again", "trigger", "sequence", "row security", "t_w_fkey"):
            assert name not in refused.value.message
        await target.execute((tmp_path / "changed-on-source.sql").read_text())
        migration.start_coordinator()
        await migration.finish()
    for query in SAME:
        assert await rows(target_database, query) == await rows(source_database, query), query
    report = await verify(migration.settings)
    assert report.is_equal, report.differences
    await source.close()
    await target.close()


async def test_ddl_that_is_accepted_is_named_at_the_end(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute("create table t (id int primary key, v int)")
    migration = Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, accept_ddl=True, cutover="auto"
    )
    async with migration:
        await migration.until_copied()
        await source.execute("create index late on t (v)")
        await migration.finish()
    assert "index late of public.t is new" in migration.observer.warnings[-1]
    await source.close()
