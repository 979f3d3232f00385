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
from live_migration.consumer.chunk_marks import NOT_KNOWN_YET
from live_migration.consumer.chunk_rebuild import due_chunks
from live_migration.coordinator import chunk_watch
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
from tests.support.segments import INT4, REAL_OIDS, TEXT, insert, logical_message, oid_of, relation, truncate

pytestmark = pytest.mark.integration

ROOT, CHUNK = QualifiedName("public", "t0"), QualifiedName("store", "chunk_1")
SOURCE = """
    create schema store;
    create table store.chunk_1 (id integer primary key check (id < 100), v text);
    insert into store.chunk_1 values (7, 'unseen');
    create schema _timescaledb_catalog;
    create table _timescaledb_catalog.compression_settings (relid oid, compress_relid oid);
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
            content = orjson.dumps({"kind": "call", "migration_id": it.migration_id})
            lane.transaction([logical_message("live_migration", content)])
            lane.cut()
            await it.send()
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
            content = orjson.dumps({"kind": "call", "migration_id": it.migration_id})
            it.lanes[0].transaction([logical_message("live_migration", content)])
            it.lanes[0].cut()
            await it.send()
            await it.until(lambda: _is_unmarked(it))
        assert await it.rows(0) == {7: "unseen"}


async def test_half_a_segment_before_a_truncate_of_a_chunk_alone_is_not_applied_twice(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """A lane that stops in a segment's midst begins again at its beginning, with nothing of it applied."""
    async with chunk_in_lane(source_database, target_database, kafka_bootstrap, unique_name) as it:
        lane = it.lanes[0]
        lane.describe("plain", relation("plain", [("id", INT4, True), ("v", TEXT, False)]))
        await it.target.execute("create table public.plain (id integer, v text)")
        await it.target.execute(
            """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state)
               values ($1, 'public', 'plain', 0, 'all', $2, true, 'ready')""",
            oid_of("plain"), COLUMNS,
        )  # fmt: skip
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
