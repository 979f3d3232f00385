"""Tables of the plan that are dropped on the source while changes are replayed: the cutover leaves them, and nothing that the source has is touched."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator.cutover import CutoverRefused
from tests.e2e.migration import Migration
from tests.e2e.test_handover import rows
from tests.integration.test_log_lost import keep_producing

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SCHEMA = """
    create table parent (id int primary key); insert into parent select generate_series(1, 10);
    create table gone (id int primary key, parent int constraint to_parent references parent);
    insert into gone select i, i from generate_series(1, 10) i;
    create table stays (id int primary key, gone int constraint to_gone references gone, parent int constraint kept references parent);
    insert into stays select i, i, i from generate_series(1, 5) i;
    create function touch() returns trigger language plpgsql as 'begin return new; end';
    create trigger touch before update on gone for each row execute function touch();
    comment on constraint to_gone on stays is 'a comment';
    create table p (id int primary key) partition by range (id);
    create table p1 partition of p for values from (0) to (10);
    create table p2 partition of p for values from (10) to (30) partition by range (id);
    create table p2a partition of p2 for values from (10) to (20);
    create table q (id int primary key) partition by range (id); create table q1 partition of q for values from (0) to (10);
    insert into p select generate_series(1, 19); insert into q select generate_series(1, 9);
"""


async def test_dropped_tables_stay_on_the_target_and_the_cutover_goes_on(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await source.execute(
            "insert into gone values (11, 1); delete from gone where id = 10; insert into q values (0)"
        )
        await source.execute("drop table gone cascade; drop table p2; drop table q")
        await source.execute("delete from parent where id = 9; insert into stays values (6, 777, 1)")
        with pytest.raises(CutoverRefused) as refused:
            await migration.finish()
        detach = 'alter table "public"."p" detach partition "public"."p2"'
        assert (
            f"public.p2a, dropped on the source, shows its rows in a partitioned table of the target: `{detach}`"
            in (refused.value.message)
        )
        assert "public.gone" not in refused.value.message
        assert "public.q" not in refused.value.message
        target = await asyncpg.connect(target_database)
        await target.execute(detach)
        await target.close()
        migration.start_coordinator()
        await migration.finish()
    said = [line for line in migration.observer.warnings if line.startswith("dropped on the source since")]
    assert said[-1].endswith("public.gone, public.p2a, public.q1")
    for query in ("select * from parent order by 1", "select * from stays order by 1", "select * from p order by 1"):
        assert await rows(target_database, query) == await rows(source_database, query)
    assert await rows(target_database, "select id from gone order by 1") == [(i,) for i in (*range(1, 10), 11)]
    assert await rows(target_database, "select id from q order by 1") == [(i,) for i in range(10)]
    keys = "select conname::text, convalidated from pg_constraint where contype = 'f' and connamespace = 'public'::regnamespace order by 1"
    assert await rows(target_database, keys) == [("kept", True)]
    assert [
        line
        for line in migration.observer.warnings
        if "foreign keys that were dropped" in line and "to_parent of public.gone" in line
    ]
    await source.close()


async def test_a_table_that_is_dropped_before_it_is_copied_again_holds_nothing_up(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The first ones before any copy, beside others in one group and alone; the last one while every table is to be copied once more."""
    source = await asyncpg.connect(source_database)
    await source.execute(
        """create table kept (id int primary key); insert into kept select generate_series(1, 10);
           create table small (id int primary key, kept int constraint to_kept references kept); insert into small select 1, 1;
           create table big (id int primary key, v text); create index on big (v);
           insert into big select i, repeat('x', 1000) from generate_series(1, 5000) i;
           create table late (id int primary key); insert into late select generate_series(1, 10)"""
    )
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path)
    migration.start_coordinator()
    migration.producer.start()
    async with migration.closing():
        await migration.until_phase("copy")
        await source.execute(
            "update small set kept = 2; insert into big values (0); delete from kept where id = 10; drop table small; drop table big"
        )
        for consumer in migration.consumers:
            consumer.start()
        await migration.until_phase("replay")
        await source.execute("insert into kept values (11)")
        await migration.until("applied", "select count(*) = 10 from kept")
        await migration.stop()
        await migration.producer.drain()
        await source.execute(f"select pg_drop_replication_slot('{unique_name}')")
        await source.execute("insert into late values (11); drop table late; insert into kept values (12)")
        migration.producer.task = None
        producing = asyncio.ensure_future(keep_producing(migration))
        migration.start_coordinator(recopy=True)
        await migration.finish()
        producing.cancel()
        await asyncio.wait([producing])
    said = [line for line in migration.observer.warnings if line.startswith("dropped on the source since")]
    assert said[-1].endswith("public.big, public.late, public.small")
    assert await rows(target_database, "select * from kept order by 1") == await rows(
        source_database, "select * from kept order by 1"
    )
    for table in ("small", "big", "late"):
        assert await rows(target_database, f"select * from {table}") == []
        events = await rows(
            target_database,
            f"select count(*) from _live_migration.events where message like 'public.{table} was dropped on%'",
        )
        assert events[0][0] >= 1  # once for each copy
    await source.close()
