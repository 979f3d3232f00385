"""Recordings of a real TimescaleDB's stream, step by step through router, decoder and applier: chunks in, whole tables out.

The target is a plain PostgreSQL whose tables stand for the hypertables; what a hypertable's root does with rows is not tested here.
"""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.common import pgoutput, postgres, state
from live_migration.common.home import HOME, SUSPECT, Home, decode_home, decode_suspect
from live_migration.common.lsn import Lsn
from live_migration.common.relation import QualifiedName
from live_migration.common.segment import HEADER, START, iterate_frames
from live_migration.common.timescale import Chunk, Hypertable, Layout
from live_migration.consumer.applier import Applier
from live_migration.consumer.decoder import Batch, LaneDecoder
from live_migration.consumer.target_tables import ChunkChangedUnseen, TargetTables
from live_migration.producer.ack_tracker import AckTracker
from live_migration.producer.homes import Homes, text_values
from live_migration.producer.router import Router
from tests.unit.test_router import copy_data

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).parents[1] / "data" / "timescaledb"
INTERNAL = "_timescaledb_internal"
UNSEEN = "delete of whole compressed batches by segmentby"
TARGET = """
    create table public.conditions (time timestamptz not null, device int not null, temp float8, note text, primary key (device, time));
    create table public.readings (time timestamptz not null, v float8);
    create table public.plain (id bigint primary key, t text);
    create schema _timescaledb_internal;
    create table _timescaledb_internal._materialized_hypertable_3 (bucket timestamptz not null, device int, temp float8, n bigint);
"""
HYPERTABLES = {1: ("public", "conditions"), 2: ("public", "readings"), 3: (INTERNAL, "_materialized_hypertable_3")}
PLANNED = {  # chunks that were there when the slot was made, by hypertable: what a plan would have
    1: ("_hyper_1_1_chunk", "_hyper_1_2_chunk"),
    2: ("_hyper_2_3_chunk", "_hyper_2_4_chunk"),
    3: ("_hyper_3_5_chunk",),
}


def read_steps() -> list[dict[str, Any]]:
    return list(json.loads((FOLDER / "steps.json").read_text()))


def read_stream() -> list[tuple[int, bytes]]:
    """Give the recorded messages, each with the WAL position that it ends at (0 for those that have none)."""
    lines = map(json.loads, (FOLDER / "stream_text.jsonl").read_text().splitlines())
    return [(int(Lsn.parse(line["wal_end"])), base64.b64decode(line["payload"])) for line in lines]


def relations() -> dict[str, int]:
    """Give the oids that the stream has for relations, and the roots' from the views."""
    views = json.loads((FOLDER / "catalog_views.json").read_text())
    found = {str(name): int(oid) for oid, name in views["oids"].items()}
    for _, message in read_stream():
        if message[0] == pgoutput.RELATION:
            relation = pgoutput.decode_relation(message)
            found[str(relation.name)] = relation.oid
    return found


def layout(oids: dict[str, int]) -> Layout:
    """Give what the source's catalogs said when the slot was made."""
    hypertables, chunks = {}, {}
    for number, (schema, name) in HYPERTABLES.items():
        oid = oids.get(f"{schema}.{name}", number)
        hypertables[oid] = Hypertable(number, oid, QualifiedName(schema, name), "time")
        for chunk in PLANNED[number]:
            chunk_oid = oids.get(f"{INTERNAL}.{chunk}", 100 + len(chunks))
            chunks[chunk_oid] = Chunk(chunk_oid, QualifiedName(INTERNAL, chunk), oid, "true")
    return Layout("2.29.2", hypertables, chunks)


def with_compressed(found: Layout, oids: dict[str, int]) -> Layout:
    """Give a layout that knows the table of a chunk's compressed rows."""
    compressed = oids[f"{INTERNAL}._hyper_1_1_chunk_compressed"]
    return replace(
        found,
        compressed={compressed: oids[f"{INTERNAL}._hyper_1_1_chunk"]},
        compressed_names={compressed: QualifiedName(INTERNAL, "_hyper_1_1_chunk_compressed")},
    )


def transactions() -> Iterator[tuple[int, list[bytes]]]:
    messages: list[bytes] = []
    for _, message in read_stream():
        messages.append(message)
        if message[0] == pgoutput.COMMIT:
            yield pgoutput.decode_commit(message).commit_lsn, messages
            messages = []
    assert not messages


class Replayer:
    """One lane for all; a restart of the producer may come after any transaction."""

    def __init__(self, found: Layout) -> None:
        self._layout = found
        self._homes = Homes(found, {})
        self._positions = [START]
        self._router = self._make_router()
        self._relations: dict[int, bytes] = {}

    def _make_router(self) -> Router:
        return Router(
            migration_id="m", topic_id=bytes(16), segment_bytes=4096, positions=self._positions, acks=AckTracker(0), homes=self._homes
        )  # fmt: skip

    def restart(self) -> None:
        """Begin a new session: the stream describes its relations anew, shows no chunk a second time, and the source has none any more."""
        self._positions = list(self._router.positions)
        self._homes = Homes(replace(self._layout, chunks={}, compressed={}, compressed_names={}), self._homes.learnt)
        self._router = self._make_router()
        self._router.drain(copy_data(list(self._relations.values())))

    def segments(self, messages: list[bytes]) -> list[bytes]:
        for message in messages:
            if message[0] == pgoutput.RELATION:
                self._relations[pgoutput.relation_oid(message)] = message
        self._router.drain(copy_data(messages))
        return [value[HEADER.size :] for record in self._router.take() for value in record.values]


async def plan(target: asyncpg.Connection, found: Layout, oids: dict[str, int]) -> None:
    await state.create_schema(target)
    insert = """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state,
                                                    kind, root_schema, root_name)
                values ($1, $2, $3, 0, 'all', '[]', false, 'ready', $4, $5, $6)"""
    for hypertable in found.hypertables.values():
        root = hypertable.name.schema, hypertable.name.name
        await target.execute(insert, hypertable.oid, *root, "hypertable", *root)
    for chunk in found.chunks.values():
        root_name = found.hypertables[chunk.hypertable].name
        await target.execute(
            insert, chunk.oid, chunk.name.schema, chunk.name.name, "chunk", root_name.schema, root_name.name
        )
    await target.execute(insert, oids["public.plain"], "public", "plain", "table", None, None)


async def fill_materialization(target: asyncpg.Connection, oids: dict[str, int]) -> None:
    """Insert the rows that the recorded refresh deletes: the recordings do not say what the aggregate held before."""
    chunk = oids[f"{INTERNAL}._hyper_3_5_chunk"]
    for _, message in read_stream():
        if message[0] == pgoutput.DELETE and pgoutput.relation_oid(message) == chunk:
            values = ", ".join("null" if value is None else f"'{value}'" for value in text_values(message))
            await target.execute(f"insert into {INTERNAL}._materialized_hypertable_3 values ({values})")


async def read_table(connection: asyncpg.Connection, table: str) -> list[list[str | None]]:
    names = [r["attname"] for r in await connection.fetch(
        "select attname from pg_attribute where attrelid = $1::text::regclass and attnum > 0 order by attnum", table)]  # fmt: skip
    texts = ", ".join(f"{name}::text" for name in names)
    return sorted([list(row) for row in await connection.fetch(f"select {texts} from {table}")], key=_order)


def _order(row: list[str | None]) -> list[str]:
    return [value or "" for value in row]


def as_target(rows: list[list[str | None]], table: str) -> list[list[str | None]]:
    return sorted([[_as_server(value) if table != "plain" else value for value in row] for row in rows], key=_order)


def _as_server(value: str | None) -> str | None:
    """Give a value of the recordings, which a driver printed, as the server prints it."""
    return value.replace("+00:00", "+00").removesuffix(".0") if value else value


@pytest.mark.parametrize("seed", range(3))
async def test_after_each_step_the_tables_are_the_recorded_ones(target_database: str, seed: int) -> None:
    """Equal after each step but for what the stream cannot tell: rows of whole batches deleted unseen, and dropped chunks."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    oids = relations()
    found = layout(oids)
    replayer = Replayer(found)
    steps = read_steps()
    pending = list(transactions())
    async with postgres.session(target_database, "target") as target:
        await target.execute(TARGET)
        await plan(target, found, oids)
        for table, rows in steps[0]["tables_after"].items():
            for row in rows:
                values = ", ".join("null" if value is None else f"'{value}'" for value in row)
                await target.execute(f"insert into public.{table} values ({values})")
        await fill_materialization(target, oids)
        decoder, applier = LaneDecoder(TargetTables(target, 0), "m"), Applier(target, 0)
        gone: dict[str, list[list[str | None]]] = {"conditions": [], "readings": [], "plain": []}
        before = steps[0]["tables_after"]
        for step in steps[1:]:
            while pending and pending[0][0] < int(Lsn.parse(step["wal_to"])):
                _, messages = pending.pop(0)
                if rng.random() < 0.4:
                    replayer.restart()
                batch = Batch()
                for body in replayer.segments(messages):
                    await decoder.decode(body, batch)
                await applier.begin()
                await applier.apply(batch)
                await target.execute("commit")
            expected = step["tables_after"]
            if step["step"] == UNSEEN or step["step"].startswith("drop_chunks"):
                lost = [row for row in before["conditions"] if row not in expected["conditions"]]
                assert lost, "the step that the stream does not tell removed nothing"
                gone["conditions"] += lost
            for table in ("conditions", "readings", "plain"):
                rows = as_target(expected[table] + gone[table], table)
                assert await read_table(target, f"public.{table}") == rows, (step["step"], table)
            before = expected
        assert not pending
        assert (
            await target.fetchval(f"select count(*) from {INTERNAL}._materialized_hypertable_3") == 9
        )  # 7 + 2 of a new chunk


def test_moves_between_a_chunk_and_its_compressed_rows_are_in_no_segment() -> None:
    """Also not when they are as long as what the fast path takes, and of a table that was on it."""
    oids = relations()
    replayer = Replayer(layout(oids))
    chunk = oids[f"{INTERNAL}._hyper_1_1_chunk"]
    kept = 0
    for _, messages in transactions():
        for body in replayer.segments(messages):
            for frame in iterate_frames(body):
                if frame.kind in b"IUD" and pgoutput.relation_oid(frame.message) == chunk:
                    kept += 1
    assert kept == 5  # two inserts, an update, two deletes: all that users did to that chunk


def test_a_truncate_begins_a_segment() -> None:
    """One of a chunk alone stops its lane: all before it must have a position of its own, or would be applied in part."""
    messages = [message for _, message in read_stream()]
    describes = next(m for m in messages if m[0] == pgoutput.RELATION)
    chunk = pgoutput.relation_oid(describes)
    row = next(m for m in messages if m[0] == pgoutput.INSERT and pgoutput.relation_oid(m) == chunk)
    truncate = b"T" + struct.pack(">IBI", 1, 0, chunk)
    begin, commit = messages[0], next(m for m in messages if m[0] == pgoutput.COMMIT)
    bodies = Replayer(layout(relations())).segments([begin, describes, row, truncate, row, commit])
    changes = [[frame.kind for frame in iterate_frames(body) if frame.kind in b"IT"] for body in bodies]
    assert changes == [[pgoutput.INSERT], [pgoutput.TRUNCATE, pgoutput.INSERT]]


def test_a_chunk_that_is_compressed_is_named_as_long_as_nobody_watches_its_compressed_rows() -> None:
    """They have no full replica identity yet: whole batches may go and nothing is said. Once a session of the producer, not at each row."""
    oids = relations()
    compressed = oids[f"{INTERNAL}._hyper_1_1_chunk_compressed"]
    replayer = Replayer(with_compressed(layout(oids), oids))
    named, homes = [], {}
    for _, messages in transactions():
        for body in replayer.segments(messages):
            for frame in iterate_frames(body):
                if frame.kind == SUSPECT:
                    named.append(decode_suspect(frame.message))
                elif frame.kind == HOME:
                    homes.update([decode_home(frame.message)])
    assert named == [compressed]
    assert homes[compressed] == Home(
        QualifiedName("public", "conditions"), QualifiedName(INTERNAL, "_hyper_1_1_chunk"), True
    )


def test_a_run_of_moves_between_rows_of_users_is_left_out() -> None:
    messages = [message for _, message in read_stream()]
    describes = next(m for m in messages if m[0] == pgoutput.RELATION)
    row = next(
        m for m in messages if m[0] == pgoutput.INSERT and pgoutput.relation_oid(m) == pgoutput.relation_oid(describes)
    )
    start = next(m for m in messages if b"::timescaledb-decompression-start" in m)
    end = next(m for m in messages if b"::timescaledb-decompression-end" in m)
    begin, commit = messages[0], next(m for m in messages if m[0] == pgoutput.COMMIT)
    replayer = Replayer(layout(relations()))
    stream = [begin, describes, *[row] * 100, start, *[row] * 500, end, *[row] * 50, commit]
    ordinals = [
        frame.ordinal
        for body in replayer.segments(stream)
        for frame in iterate_frames(body)
        if frame.kind == pgoutput.INSERT
    ]
    assert ordinals == [*range(1, 101), *range(603, 653)]


async def test_rows_of_a_compressed_table_outside_of_markers_stop_the_lane_for_that_chunk(target_database: str) -> None:
    messages = [message for _, message in read_stream()]
    at = next(i for i, m in enumerate(messages) if b"_hyper_1_1_chunk_compressed" in m)
    row = next(m for m in messages[at:] if m[0] == pgoutput.INSERT)
    begin, commit = messages[0], next(m for m in messages if m[0] == pgoutput.COMMIT)
    oids = relations()
    found = layout(oids)
    body, *others = Replayer(with_compressed(found, oids)).segments([begin, messages[at], row, row, commit])
    assert len(others) == 1  # each in a segment of its own: what stands before can be applied
    async with postgres.session(target_database, "target") as target:
        await target.execute(TARGET)
        await plan(target, found, oids)
        with pytest.raises(ChunkChangedUnseen) as caught:
            await LaneDecoder(TargetTables(target, 0), "m").decode(body, Batch())
        assert caught.value.home == Home(
            QualifiedName("public", "conditions"), QualifiedName(INTERNAL, "_hyper_1_1_chunk"), is_compressed=True
        )
        # once it was copied by a snapshot that shows the transaction, the lane goes on
        xid = pgoutput.decode_begin(begin).xid
        await target.execute(
            "update _live_migration.tables set snapshot = $1, horizon = 'FFFF/0' where table_name = '_hyper_1_1_chunk'",
            f"{xid + 1}:{xid + 1}:",
        )
        batch = Batch()
        await LaneDecoder(TargetTables(target, 0), "m").decode(body, batch)
        assert batch.is_empty()
        # but the table, recorded without REPLICA IDENTITY FULL, does not tell what is deleted there after that snapshot
        assert batch.suspects == {pgoutput.relation_oid(row): caught.value.home}
