"""A table with several lanes on real servers: what is refused, and that its lanes wait for one another and for nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import pytest

from live_migration.common.lanes import LaneMap
from live_migration.common.postgres import session
from live_migration.common.relation import QualifiedName
from live_migration.common.segment import START
from live_migration.common.settings import load_settings
from live_migration.coordinator.lane_findings import find_lanes
from live_migration.producer.ack_tracker import AckTracker
from live_migration.producer.router import Router
from tests.support.lanes import Replay, replay
from tests.support.segments import INT4, TEXT, insert, relation, send, truncate, update

pytestmark = pytest.mark.integration

SCHEMA = """
create extension citext;
create extension btree_gist;
create type mood as enum ('good', 'bad');
create domain code as text;
create table fit_number (id bigint primary key, n int unique);
alter table fit_number drop constraint fit_number_n_key;
create table fit_text (a uuid, b varchar(20) collate "C", primary key (a, b) include (c), c date);
create table fit_index (at timestamptz not null, n int);
create unique index on fit_index (at);
alter table fit_index replica identity using index fit_index_at_idx;
create table parted (id int primary key) partition by range (id);
create table fit_partition partition of parted for values from (0) to (10);

create table second_unique (id int primary key, email text unique);
create table second_partial (id int primary key, n int);
create unique index on second_partial (n) where n > 0;
create table excluded (id int primary key, n int, exclude using gist (n with =));
create table by_numeric (id numeric primary key);
create table by_float (id float8 primary key);
create table by_char (id char(4) primary key);
create table by_citext (id citext primary key);
create table by_enum (a int, id mood, primary key (a, id));
create table by_domain (id code primary key);
create table without_key (id int);
create table is_full (id int primary key);
alter table is_full replica identity full;
create table is_deferrable (id int primary key deferrable);
create unlogged table is_unlogged (id int primary key);
create table becomes_one (at timestamptz primary key);
create view is_view as select 1 as id;
"""
FIT = ("fit_number", "fit_text", "fit_index", "fit_partition")
REFUSED = {
    "absent": "does not have",
    "parted": "partitioned table",
    "second_unique": "second_unique_email_key",
    "second_partial": "second_partial_n_idx",
    "excluded": "excluded_n_excl",
    "by_numeric": "id (numeric)",
    "by_float": "id (double precision)",
    "by_char": "id (character(4))",
    "by_citext": "id (public.citext)",
    "by_enum": "id (public.mood)",
    "by_domain": "id (public.code)",
    "without_key": "no usable replica identity",
    "is_full": "FULL",
    "is_deferrable": "no usable replica identity",
    "is_unlogged": "not logged",
    "becomes_one": "hypertable",
    "is_view": "no table",
}


async def test_tables_that_cannot_be_split_are_refused(source_database: str) -> None:
    connection = await asyncpg.connect(source_database)
    await connection.execute(SCHEMA)
    await connection.close()
    lanes = tuple(f"public.{name}=2" for name in (*FIT, *REFUSED))
    settings = load_settings({"lanes": lanes, "hypertable": ("public.becomes_one:at,1 day",)})
    async with session(source_database, "source") as source:
        findings = await find_lanes(settings, source)
    assert all(finding.level == "error" and finding.hint for finding in findings)
    said = {
        name: [f.what for f in findings if f"public.{name}" in f.what.split(",")[0].split()]
        for name in (*FIT, *REFUSED)
    }
    for name in FIT:
        assert said[name] == []
    for name, reason in REFUSED.items():
        assert len(said[name]) == 1, name
        assert reason in said[name][0]


HOT = "t1"
LANES = 7
"""Of the table, behind one that is shared."""
KEYS = range(210)


@asynccontextmanager
async def split_replay(target: str, kafka: str, name: str, **options: object) -> AsyncIterator[tuple[Replay, Router]]:
    """Give a migration in replay whose table `t1` has the lanes from 1 on, and a producer's router for it."""
    async with replay(target, kafka, name, lane_count=1 + LANES, **options) as lanes:
        await lanes.target.execute("update _live_migration.tables set lanes = $1 where table_name = $2", LANES, HOT)
        row = await lanes.target.fetchrow("select id, topic_id from _live_migration.migration")
        router = Router(
            migration_id=str(row["id"]),
            topic_id=UUID(str(row["topic_id"])).bytes,
            segment_bytes=65_536,
            positions=[START] * (1 + LANES),
            acks=AckTracker(0),
            lane_map=LaneMap(1, ((QualifiedName("public", HOT), LANES),)),
        )
        describe = relation(HOT, [("id", INT4, True), ("v", TEXT, False)])
        _feed(router, [describe])
        yield lanes, router


def _feed(router: Router, messages: list[bytes]) -> None:
    for message in messages:
        copied = b"w" + bytes(24) + message
        router.drain(b"d" + (len(copied) + 4).to_bytes(4, "big") + copied)


def _transact(router: Router, number: int, changes: list[bytes]) -> None:
    lsn = number * 0x1000
    begin = b"B" + lsn.to_bytes(8, "big") + bytes(8) + (number + 1000).to_bytes(4, "big")
    commit = b"C\0" + lsn.to_bytes(8, "big") + (lsn + 8).to_bytes(8, "big") + bytes(8)
    _feed(router, [begin, *changes, commit])


async def _send(lanes: Replay, router: Router) -> None:
    records = [(record.lane, value) for record in router.take() for value in record.values]
    await send(lanes.producer, lanes.settings.changes_topic, records)


async def _until_applied(lanes: Replay, router: Router) -> None:
    async def is_applied() -> bool:
        rows = await lanes.target.fetch(
            "select commit_lsn - '0/0'::pg_lsn as lsn, ordinal from _live_migration.checkpoints order by lane"
        )
        return [(int(row["lsn"]), row["ordinal"]) for row in rows] == [tuple(each) for each in router.positions]

    await lanes.until(is_applied)


async def test_a_truncate_waits_for_every_lane_and_every_lane_for_it(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with split_replay(target_database, kafka_bootstrap, unique_name) as (lanes, router):
        _transact(router, 1, [insert(HOT, str(n), "old") for n in KEYS])
        await _send(lanes, router)
        async with lanes.consumer("worker-1"), lanes.consumer("worker-2"):
            await _until_applied(lanes, router)
            other = await asyncpg.connect(target_database)
            holding = other.transaction()
            await holding.start()
            await other.execute(f"select from public.{HOT} where id = 5 for update")  # its lane cannot go on
            _transact(router, 2, [update(HOT, "5", "held")])
            _transact(router, 3, [truncate(HOT), *[insert(HOT, str(n), "within") for n in KEYS if n % 2]])
            _transact(router, 4, [insert(HOT, str(n), "after") for n in KEYS if n % 2 == 0])
            await _send(lanes, router)

            async def have_others_arrived() -> bool:
                count: int = await lanes.target.fetchval(
                    "select count(*) from _live_migration.checkpoints where arrived_lsn = $1::text::pg_lsn", "0/3000"
                )
                return count == LANES - 2

            await lanes.until(have_others_arrived)
            rows = await other.fetch(f"select v, count(*) from public.{HOT} group by v")
            assert [tuple(row) for row in rows] == [("old", len(KEYS))]
            leader = await lanes.checkpoint(1)
            assert leader["commit_lsn"] < 0x3000
            await holding.rollback()
            await _until_applied(lanes, router)
            await other.close()
        expected = {n: "within" if n % 2 else "after" for n in KEYS}
        assert await lanes.rows(1) == expected


async def test_lanes_that_wait_hold_no_memory_that_the_others_need(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """Each has more behind the meeting than its share of the consumer's memory; the leader has as much before it."""
    big = "x" * 30_000
    async with split_replay(target_database, kafka_bootstrap, unique_name, memory=8 << 20) as (lanes, router):
        _transact(router, 1, [insert(HOT, str(n), "old") for n in KEYS])
        leaders = [n for n in KEYS if _lane_of(router, n) == 1]
        for number in range(2, 32):
            _transact(router, number, [update(HOT, str(n), f"{number}{big}") for n in leaders[:20]])
        _transact(router, 40, [truncate(HOT), *[insert(HOT, str(n), "within") for n in KEYS]])
        for number in range(41, 61):
            _transact(router, number, [update(HOT, str(n), f"{number}{big}") for n in KEYS])
            await _send(lanes, router)
        async with lanes.consumer():
            await _until_applied(lanes, router)
        assert await lanes.rows(1) == dict.fromkeys(KEYS, f"60{big}")


def _lane_of(router: Router, key: int) -> int:
    """Give the lane in which a row's key lies, by another router's word."""
    twin = Router(
        migration_id="twin",
        topic_id=bytes(16),
        segment_bytes=65_536,
        positions=[START] * (1 + LANES),
        acks=AckTracker(0),
        lane_map=LaneMap(1, ((QualifiedName("public", HOT), LANES),)),
    )
    _feed(twin, [relation(HOT, [("id", INT4, True), ("v", TEXT, False)])])
    _transact(twin, 1, [insert(HOT, str(key), "")])
    return next(record.lane for record in twin.take())


async def test_a_second_unique_index_on_the_target_stops_the_lanes(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with split_replay(target_database, kafka_bootstrap, unique_name) as (lanes, router):
        await lanes.target.execute(f"create unique index second on public.{HOT} (v)")
        _transact(router, 1, [insert(HOT, str(n), str(n)) for n in KEYS])
        await _send(lanes, router)
        async with lanes.consumer():

            async def have_stopped() -> bool:
                errors = await lanes.target.fetch("select error from _live_migration.checkpoints where lane > 0")
                return all(row["error"] and f"public.{HOT} has {LANES} lanes" in row["error"] for row in errors)

            await lanes.until(have_stopped)
            assert await lanes.rows(1) == {}
            await lanes.target.execute("drop index public.second")
            await _until_applied(lanes, router)
        assert await lanes.rows(1) == {n: str(n) for n in KEYS}


async def test_a_target_that_forgets_an_arrival_makes_the_lanes_meet_again(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """As one that crashes does: a lane that waits, and one that is about to go on, must not rely on what is gone."""
    async with split_replay(target_database, kafka_bootstrap, unique_name) as (lanes, router):
        _transact(router, 1, [insert(HOT, str(n), "old") for n in KEYS])
        _transact(router, 2, [truncate(HOT), insert(HOT, "1", "new")])
        await _send(lanes, router)
        async with lanes.consumer("worker-1"), lanes.consumer("worker-2"):
            for _ in range(3):
                await _until_applied(lanes, router)
                assert await lanes.rows(1) == {1: "new"}
                await lanes.target.execute(
                    f"""truncate public.{HOT};
                        update _live_migration.checkpoints set next_offset = 0, commit_lsn = '0/0', ordinal = 0, arrived_lsn = null;
                        select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'live-migration lane%'"""
                )
            await _until_applied(lanes, router)
        assert await lanes.rows(1) == {1: "new"}
