"""Rules of chunks that the stream does not tell all of: each test fails without its rule. No TimescaleDB is needed.

The source is a plain database with a table that stands for a chunk, the target's table for its hypertable.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import asyncpg
import orjson
import pytest

from live_migration.common.catalog import TableInfo, list_tables
from live_migration.common.home import Home, encode_suspect
from live_migration.common.lsn import Lsn
from live_migration.common.postgres import session
from live_migration.common.relation import QualifiedName
from live_migration.consumer.chunk_marks import NOT_KNOWN_YET, note_suspects
from live_migration.consumer.chunk_rebuild import due_chunks
from live_migration.coordinator import chunk_watch, newcomers
from live_migration.coordinator.chunk_watch import follow_chunks
from live_migration.coordinator.run import Run
from live_migration.producer.publication import (
    ALL_OPERATIONS,
    INSERT_ONLY,
    create_publication,
    published_tables,
)
from tests.support.begun import begun
from tests.support.lanes import COLUMNS, Replay, replay
from tests.support.segments import (
    INT4,
    REAL_OIDS,
    TEXT,
    LaneWriter,
    insert,
    logical_message,
    oid_of,
    relation,
    truncate,
    update,
)

pytestmark = pytest.mark.integration

ROOT, CHUNK = QualifiedName("public", "t0"), QualifiedName("store", "chunk_1")
SOURCE = """
    create schema if not exists store;
    create table store.chunk_1 (id integer primary key check (id < 100), v text);
    insert into store.chunk_1 values (7, 'unseen');
    create schema _timescaledb_catalog;
    create table _timescaledb_catalog.compression_settings (relid oid, compress_relid oid);
    create table _timescaledb_catalog.chunk (id int, relid oid);
    create table _timescaledb_catalog.dimension (id int, column_name name, num_slices int);
    create table _timescaledb_catalog.dimension_slice (chunk_id int, dimension_id int, range_start bigint, range_end bigint);
"""
OLD_XID = 100
"""Every snapshot of a server shows it."""


@asynccontextmanager
async def chunk_in_lane(source: str, target: str, kafka: str, name: str) -> AsyncIterator[Replay]:
    """Lane 0 holds a hypertable with one chunk, whose compressed rows lie in a table of their own, and nothing is applied yet."""
    async with session(source, "source") as connection:
        await connection.execute(SOURCE)
        REAL_OIDS["chunk_1"] = oid = await connection.fetchval("select 'store.chunk_1'::regclass::oid")
    async with replay(target, kafka, name, lane_count=2, source=source) as it:
        await it.target.execute("update _live_migration.tables set kind = 'hypertable' where table_name = 't0'")
        await it.target.execute(
            """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind,
                   hypertable_oid, root_schema, root_name, copies_to_root, range)
               values ($1, 'store', 'chunk_1', 0, 'all', $2, true, 'ready', 'chunk', $3, 'public', 't0', true, '(id < 100)')""",
            oid, COLUMNS, oid_of("t0"),
        )  # fmt: skip
        lane = it.lanes[0]
        lane.xid = OLD_XID
        lane.describe("chunk_1", relation("chunk_1", [("id", INT4, True), ("v", TEXT, False)]), home=Home(ROOT, CHUNK))
        packed = relation("packed", [("id", INT4, False)], identity="f")
        lane.describe("packed", packed, home=Home(ROOT, CHUNK, is_compressed=True))
        yield it
    del REAL_OIDS["chunk_1"]


async def test_a_truncate_before_rows_that_came_unseen_is_applied_before_the_chunk_is_copied(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """TRUNCATE of the hypertable, then a COPY straight into compressed rows, both in one backlog: the copied row must outlive the TRUNCATE."""
    async with chunk_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        lane = it.lanes[0]
        lane.transaction([insert("chunk_1", "1", "old"), insert("chunk_1", "2", "old")])
        lane.transaction([truncate("t0", "chunk_1")])
        lane.cut()
        lane.transaction([insert("packed", "1")])
        lane.cut()
        await it.send()
        async with it.consumer():
            await it.until_applied()
        assert await it.rows(0) == {7: "unseen"}


async def test_an_event_on_a_chunk_that_is_marked_for_later_has_it_copied_early_and_again_then(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """The lane cannot go on without the copy, and what stands between it and the mark's position may undo it: here a TRUNCATE."""
    async with chunk_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        lane = it.lanes[0]
        lane.transaction([insert("packed", "1")])
        lane.cut()
        lane.transaction([truncate("t0")])
        lane.cut()
        later = str(Lsn(lane.next_lsn))
        await it.target.execute(
            """update _live_migration.tables set rebuild = 'it was made unseen', rebuild_lsn = $1::text::pg_lsn, unseen_lsn = $1::text::pg_lsn
               where kind = 'chunk'""",
            later,
        )
        await it.send()
        async with it.consumer():
            await it.until_applied()
            assert await it.rows(0) == {}, "copied early, and truncated"
            assert await _marks(it.target) == ["it was made unseen"]
            await _call(it)
            await it.until(lambda: _is_unmarked(it))
        assert await it.rows(0) == {7: "unseen"}


async def test_a_copy_from_before_what_was_missed_leaves_the_mark(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """Its snapshot may lack rows that the stream does not tell: only a later copy makes up for them."""
    async with chunk_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        mark = "update _live_migration.tables set rebuild = 'it was compressed', unseen_lsn = $1 where kind = 'chunk'"
        await it.target.execute(mark, 2**62)
        async with it.consumer():
            await it.until(lambda: _is_copied(it))
            assert await _marks(it.target) == ["it was compressed"]
            await it.target.execute(mark, 1)
            await _call(it)
            await it.until(lambda: _is_unmarked(it))
        assert await it.rows(0) == {7: "unseen"}


async def _call(it: Replay) -> None:
    """Have the lane look for what is due."""
    content = orjson.dumps({"kind": "call", "migration_id": it.migration_id})
    it.lanes[0].transaction([logical_message("live_migration", content)])
    it.lanes[0].cut()
    await it.send()


async def _add_plain(it: Replay, columns: str) -> None:
    """Put an ordinary table into the lane of the hypertable."""
    it.lanes[0].describe("plain", relation("plain", [("id", INT4, True), ("v", TEXT, False)]))
    await it.target.execute(f"create table public.plain ({columns})")
    await it.target.execute(
        """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state)
           values ($1, 'public', 'plain', 0, 'all', $2, true, 'ready')""",
        oid_of("plain"), COLUMNS,
    )  # fmt: skip


async def test_a_truncate_that_is_undone_with_an_open_transaction_does_not_take_what_was_copied(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """A deferrable constraint keeps the lane's transaction open to the source's commit; rows that come unseen before that undo it."""
    async with chunk_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        lane = it.lanes[0]
        await _add_plain(it, "id integer unique deferrable, v text")
        lane.transaction([insert("chunk_1", "1", "old")])
        lane.cut()
        lane.transaction([insert("plain", "1", "x"), truncate("t0", "chunk_1"), insert("packed", "1")], cut_after=2)
        lane.cut()
        await it.send()
        async with it.consumer():
            await it.until_applied()
            await _call(it)
            await it.until(lambda: _is_unmarked(it))
        assert await it.rows(0) == {7: "unseen"}
        assert await it.target.fetchval("select count(*) from public.plain") == 1


async def test_half_a_segment_before_a_truncate_of_a_chunk_alone_is_not_applied_twice(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """A lane that stops in a segment's midst begins again at its beginning, with nothing of it applied."""
    async with chunk_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        lane = it.lanes[0]
        await _add_plain(it, "id integer, v text")
        lane.transaction([insert("plain", "1", "before")])
        lane.cut()
        lane.transaction([insert("plain", "2", "in the same segment"), truncate("chunk_1")])
        lane.cut()
        await it.send()
        async with it.consumer():
            await it.until_applied()
        rows = await it.target.fetch("select id, v from public.plain order by id")
        assert [tuple(row) for row in rows] == [(1, "before"), (2, "in the same segment")]
        assert await it.rows(0) == {7: "unseen"}


async def test_changes_of_what_is_left_out_are_passed_over(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """An aggregate's rows where the target has plain tables alone: of chunks that are known, new, and compressed; others of the lane go on."""
    async with chunk_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        lane, hidden = it.lanes[0], QualifiedName("public", "hidden")
        lane.xid = 0  # no snapshot shows these
        await it.target.execute(
            """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind, is_left_out)
               values ($1, 'public', 'hidden', 0, 'insert', '[]', false, 'ready', 'hypertable', true)""",
            oid_of("hidden"),
        )
        for table, is_compressed in (("hidden", None), ("hidden_1", False), ("hidden_packed", True)):
            home = None if is_compressed is None else Home(hidden, QualifiedName("store", "hidden_1"), is_compressed)
            lane.describe(table, relation(table, [("hour", INT4, False)], identity="f"), home=home)
        lane.transaction([insert("hidden_1", "1"), insert("chunk_1", "1", "seen"), truncate("hidden", "hidden_1")])
        lane.transaction([insert("hidden_packed", "1")])
        lane.cut()
        await it.send()
        async with it.consumer():
            await it.until_applied()
        assert await it.rows(0) == {1: "seen"}
        assert await _marks(it.target) == []


NEWCOMERS = """
    create table public.t0 (id integer primary key, v text);
    create table store.made_1 (like public.t0 including all, constraint range check (id >= 100 and id < 200));
    create table store.made_2 (like public.t0 including all, constraint range check (id >= 200 and id < 300));
    create table store.made_3 (like public.t0 including all, constraint range check (id >= 300 and id < 400));
    alter table store.made_1 inherit public.t0;
    alter table store.made_2 inherit public.t0;
    alter table store.made_3 inherit public.t0;
    insert into store.made_3 values (300, 'of nobody else');
"""
MERGE = """
    alter table store.made_1 drop constraint range, add constraint range check (id >= 100 and id < 300);
    insert into store.made_1 values (100, 'own'), (200, 'changed'), (201, 'untouched');
    drop table store.made_2;
"""
SPLIT = """
    alter table store.chunk_1 inherit public.t0, drop constraint chunk_1_id_check, add constraint range check (id < 50);
    create table store.half (like public.t0 including all, constraint range check (id >= 50 and id < 100));
    alter table store.half inherit public.t0;
    insert into store.half values (60, 'changed'), (61, 'untouched');
"""


@asynccontextmanager
async def newcomers_in_lane(source: str, target: str, kafka: str, name: str) -> AsyncIterator[Replay]:
    """As `chunk_in_lane`; the source has three chunks made after the plan, which its lane has not met."""
    async with session(source, "source") as connection:
        await connection.execute("create schema if not exists store;" + NEWCOMERS)
        made = ("t0", "made_1", "made_2", "made_3")
        for table in made:
            schema = "public" if table == "t0" else "store"
            REAL_OIDS[table] = await connection.fetchval(f"select '{schema}.{table}'::regclass::oid")
    async with chunk_in_lane(source, target, kafka, name) as it:
        await it.target.execute(
            "update _live_migration.tables set root_schema = 'public', root_name = 't0' where kind = 'hypertable'"
        )
        lane = it.lanes[0]
        for table in made[1:]:
            home = Home(ROOT, QualifiedName("store", table))
            lane.describe(table, relation(table, [("id", INT4, True), ("v", TEXT, False)]), home=home)
        yield it
    for table in made:
        del REAL_OIDS[table]


async def test_a_chunk_that_nobody_knew_and_that_is_gone_has_its_rows_in_another_that_nobody_knew(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """Its range is told by nobody: all that came since are copied, once, when all before is applied; one whose range is known is not."""
    async with newcomers_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        lane = it.lanes[0]
        async with session(source_database, "source") as source:
            await source.execute(MERGE)
        await it.target.execute(
            """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind,
                   hypertable_oid, root_schema, root_name, copies_to_root, range)
               values ($1, 'store', 'made_3', 0, 'all', $2, true, 'ready', 'chunk', $3, 'public', 't0', true, '((id >= 300) AND (id < 400))')""",
            oid_of("made_3"), COLUMNS, oid_of("t0"),
        )  # fmt: skip
        lane.transaction([insert("made_1", "100", "own")])
        lane.transaction([insert("made_2", "200", "before"), insert("made_2", "201", "untouched")])
        lane.cut()
        await it.send()
        async with it.consumer():
            await it.until_applied()
            assert await _marks(it.target) == ["it may hold rows of another that was merged or split"]
            lane.transaction([update("made_1", "200", "changed")])  # no row is there yet: it is copied early
            lane.cut()
            await it.send()
            await it.until_applied()
            assert await _marks(it.target), "what is before the mark's position may undo it"
            await _pass_marks(it, lane)
        assert await it.rows(0) == {100: "own", 200: "changed", 201: "untouched"}


async def test_a_planned_chunk_that_was_split_before_its_copy_has_its_other_half_copied_too(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """And no chunk that came since and lies elsewhere."""
    async with newcomers_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        lane = it.lanes[0]
        async with session(source_database, "source") as source:
            await source.execute(SPLIT)
        await it.target.execute(
            "update _live_migration.tables set rebuild = 'it was compressed or decompressed' where kind = 'chunk'"
        )
        async with it.consumer():
            await it.until(lambda: _has_row(it, 7))
            await _pass_marks(it, lane)
        assert await it.rows(0) == {7: "unseen", 60: "changed", 61: "untouched"}


async def test_a_chunk_that_was_gone_before_anybody_could_ask_whose_it_was(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """A source role that publishes no catalog: its name alone tells what hypertable may hold its rows in another chunk."""
    async with newcomers_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        lane = it.lanes[0]
        async with session(source_database, "source") as source:
            await source.execute(MERGE)
            await source.execute(
                """insert into pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
                   values (1, 'timescaledb', 10, 2200, false, '2.29.2');
                   create table _timescaledb_catalog.hypertable
                       (schema_name name, table_name name, associated_schema_name name, associated_table_prefix name);
                   insert into _timescaledb_catalog.hypertable values ('public', 't0', 'store', 'made'), ('public', 't1', 'store', 'other')"""
            )
        await it.target.execute("delete from _live_migration.tables where kind = 'chunk'")
        lane.describe("made_2", relation("made_2", [("id", INT4, True), ("v", TEXT, False)], schema="store"))
        lane.transaction([insert("made_2", "200", "before"), insert("made_2", "201", "untouched")])
        lane.transaction([insert("made_1", "100", "own")])
        lane.cut()
        await it.send()
        async with it.consumer():
            await it.until_applied()
            await _pass_marks(it, lane)
        assert await it.rows(0) == {100: "own", 200: "changed", 201: "untouched", 300: "of nobody else"}


async def test_a_chunk_that_is_gone_is_passed_over_though_something_bears_its_hypertables_name(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """That is in no plan yet, and may never be a hypertable's: its copy, if there will be one, is later. Compressed rows may come by first."""
    async with chunk_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        lane, home = it.lanes[0], Home(QualifiedName("public", "later"), QualifiedName("store", "was_1"))
        async with session(source_database, "source") as source:
            await source.execute("create table public.later (v text)")
        lane.describe("was_packed", relation("was_packed", [("id", INT4, False)], identity="f"),
                      home=replace(home, is_compressed=True))  # fmt: skip
        lane.describe("was_1", relation("was_1", [("id", INT4, True), ("v", TEXT, False)]), home=home)
        lane.transaction([insert("was_packed", "1")])
        lane.transaction([insert("was_1", "2", "gone"), insert("chunk_1", "3", "seen")])
        lane.cut()
        await it.send()
        async with it.consumer():
            await it.until_applied()
        assert await it.rows(0) == {3: "seen"}


async def test_chunks_of_a_newcomer_that_was_dropped_are_let_go_with_it(
    source_database: str, target_database: str
) -> None:
    """Another may bear its name by now, and rows that the stream still has of the first must not go to it."""
    async with session(source_database, "source") as source, begun(source_database, target_database) as (run, _):
        await run.target.execute(
            """create table public.t0 (id integer primary key, v text);
               insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind,
                   hypertable_oid, root_schema, root_name, newcomer, rebuild)
               values (5, 'public', 't0', 3, 'all', '[]', true, 'ready', 'hypertable', null, 'public', 't0', 'followed', null),
                      (6, 'store', 'made_1', 3, 'all', '[]', true, 'ready', 'chunk', 5, 'public', 't0', 'met', 'unseen'),
                      (7, 'store', 'other_1', 3, 'all', '[]', true, 'ready', 'chunk', 8, 'public', 't1', 'met', null)"""
        )
        async with run.target_session("newcomers") as target:
            await newcomers._let_go(run, source, target, [])
        rows = await run.target.fetch(
            """select oid, newcomer, rebuild, snapshot is not null as is_passed_over from _live_migration.tables order by oid"""
        )
        assert [tuple(row) for row in rows] == [
            (5, "gone", None, True),
            (6, "gone", None, True),
            (7, "met", None, False),
        ]


HASHED = """
    create schema _timescaledb_functions;
    create function _timescaledb_functions.get_partition_hash(integer) returns integer language sql immutable as 'select $1';
    alter table store.chunk_1 inherit public.t0, drop constraint chunk_1_id_check,
        add constraint range check (_timescaledb_functions.get_partition_hash(id) < 100);
"""


async def test_chunks_of_a_hash_that_were_merged_cost_one_copy_of_their_plain_table(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """The target cannot tell them apart, so all is copied; the ranges are known then, and the next look finds none of them changed."""
    async with newcomers_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        await it.target.execute(
            "update _live_migration.tables set rebuild = 'others were merged into it' where kind = 'chunk'"
        )
        async with session(source_database, "source") as source:
            await source.execute(HASHED)
            async with it.consumer():
                await it.until(lambda: _is_unmarked(it))
            assert await it.rows(0) == {7: "unseen", 300: "of nobody else"}
            now = await source.fetchval(
                "select pg_get_expr(conbin, conrelid) from pg_constraint where conrelid = 'store.chunk_1'::regclass and contype = 'c'"
            )
            assert await it.target.fetchval("select range from _live_migration.tables where kind = 'chunk'") == now


async def _has_row(it: Replay, row: int) -> bool:
    return row in await it.rows(0)


async def _pass_marks(it: Replay, lane: LaneWriter) -> None:
    """Bring the lane past the positions of all marks, and wait until none is left."""
    async with session(it.settings.source_uri(), "source") as source:
        lane.next_lsn = int(await source.fetchval("select pg_current_wal_insert_lsn() - '0/0'")) + 0x100
    content = orjson.dumps({"kind": "call", "migration_id": it.migration_id})
    lane.transaction([logical_message("live_migration", content)])
    lane.cut()
    await it.send()
    await it.until(lambda: _is_unmarked(it))


async def test_a_lane_that_sees_a_chunk_being_compressed_says_so_with_its_checkpoint(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """What is deleted of the compressed rows is not told from there on: once the lane has passed, its note alone says so."""
    async with chunk_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        it.lanes[0].transaction([insert("chunk_1", "1", "seen"), encode_suspect(oid_of("packed"))])
        it.lanes[0].cut()
        await it.send()
        async with it.consumer():
            await it.until_applied()
        (noted,) = await it.target.fetch("select * from _live_migration.suspects")
        assert tuple(noted) == (oid_of("packed"), CHUNK.schema, CHUNK.name, ROOT.schema, ROOT.name)
        assert await it.rows(0) == {1: "seen"}


async def test_a_call_behind_a_barrier_does_not_take_its_place(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """Both in one batch: the coordinator waits for the barrier's id, and would for ever."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=1) as it, it.consumer():
        for kind in ("barrier", "call"):
            content = orjson.dumps({"kind": kind, "migration_id": it.migration_id, "id": f"the {kind}"})
            it.lanes[0].transaction([logical_message("live_migration", content)])
        it.lanes[0].cut()
        await it.send()
        await it.until_applied()
        assert (await it.checkpoint(0))["barrier"] == "the barrier"


async def _marks(target: asyncpg.Connection) -> list[str]:
    rows = await target.fetch("select rebuild from _live_migration.tables where rebuild is not null")
    return [row["rebuild"] for row in rows]


async def _is_copied(it: Replay) -> bool:
    return await it.rows(0) == {7: "unseen"}


async def _is_unmarked(it: Replay) -> bool:
    return not await _marks(it.target)


class Died(Exception):
    """The coordinator is gone at this point."""


async def test_a_coordinator_that_dies_once_a_chunk_is_published_has_marked_it(
    source_database: str, target_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once published it looks as if nothing of it had been missed: its successor knows by the mark alone."""
    async with session(source_database, "source") as source, begun(source_database, target_database) as (run, _):
        await source.execute("create table public.t0 (id integer primary key, v text);" + SOURCE)
        await create_publication(source, run.settings.publication, ALL_OPERATIONS)
        await create_publication(source, run.settings.insert_publication, INSERT_ONLY)
        root, chunk = await _stand_for_a_hypertable(source, monkeypatch)
        await run.target.execute(
            """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind,
                   root_schema, root_name)
               values ($1, 'public', 't0', 3, 'all', $2, true, 'ready', 'hypertable', 'public', 't0')""",
            root.oid, COLUMNS,
        )  # fmt: skip

        async def publish_and_die(*arguments: object, **options: object) -> None:
            await add_tables(*arguments, **options)
            if await published_tables(source, run.settings.publication):
                raise Died

        add_tables = chunk_watch.add_tables
        async with run.target_session("chunks") as target:
            with monkeypatch.context() as death:
                death.setattr(chunk_watch, "add_tables", publish_and_die)
                with pytest.raises(Died):
                    await follow_chunks(run, source, target)
            assert chunk.oid in await published_tables(source, run.settings.publication)
            assert await _unseen(target) == NOT_KNOWN_YET
            assert not await due_chunks(target, 3, NOT_KNOWN_YET - 1), "nobody may copy it before it is told of"

            before = await source.fetchval("select pg_current_wal_insert_lsn() - '0/0'")
            await follow_chunks(run, source, target)
            unseen = await _unseen(target)
            assert before <= unseen < NOT_KNOWN_YET
            (due,) = await due_chunks(target, 3, unseen)
            assert (due.oid, due.name, due.root) == (chunk.oid, CHUNK, ROOT)


async def test_a_suspect_that_is_noted_again_while_the_coordinator_marks_it_is_looked_at_again(
    source_database: str, target_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its lane saw the second time may be behind the position that the mark speaks of."""
    suspects = {5: Home(ROOT, CHUNK, is_compressed=True)}
    async with session(source_database, "source") as source, begun(source_database, target_database) as (run, _):
        await source.execute("create table public.t0 (id integer primary key, v text);" + SOURCE)
        await create_publication(source, run.settings.publication, ALL_OPERATIONS)
        await create_publication(source, run.settings.insert_publication, INSERT_ONLY)
        await _stand_for_a_hypertable(source, monkeypatch)
        async with run.target_session("chunks") as target, run.target_session("lane") as lane:
            await note_suspects(lane, suspects)

            async def mark_while_noted(*arguments: object) -> None:
                await set_marks(*arguments)
                await note_suspects(lane, suspects)

            set_marks = chunk_watch.set_marks
            with monkeypatch.context() as meanwhile:
                meanwhile.setattr(chunk_watch, "set_marks", mark_while_noted)
                await follow_chunks(run, source, target)
            assert set((await chunk_watch.read_suspects(target)).values()) == {CHUNK}
            await follow_chunks(run, source, target)
            assert not await chunk_watch.read_suspects(target)


async def _stand_for_a_hypertable(
    source: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> tuple[TableInfo, TableInfo]:
    """Have the source's two tables be taken for a hypertable and its chunk."""
    tables = {table.name: table for table in await list_tables(source)}
    root = replace(tables[ROOT], part="hypertable")
    chunk = replace(tables[CHUNK], part="chunk", hypertable=root.oid, range="(id < 100)")

    async def list_both(*_: object) -> Sequence[TableInfo]:
        return [root, chunk]

    async def tell_nobody(*_: object) -> None:
        """There is no producer."""

    monkeypatch.setattr(Run, "list_tables", list_both)
    monkeypatch.setattr(Run, "publications_changed", tell_nobody)
    return root, chunk


async def _unseen(target: asyncpg.Connection) -> int:
    return int(
        await target.fetchval(
            "select unseen_lsn - '0/0'::pg_lsn from _live_migration.tables where table_name = 'chunk_1'"
        )
    )
