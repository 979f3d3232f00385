"""The stream into lanes: ordinals, duplicates, self-contained segments, fragments, barriers."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common import pgoutput
from live_migration.common.control import WalMessage
from live_migration.common.errors import FormatError
from live_migration.common.home import SUSPECT, encode_suspect
from live_migration.common.lanes import lane_of
from live_migration.common.relation import QualifiedName
from live_migration.common.segment import COMMIT_ORDINAL, HEADER, START, Position, decode_header, iterate_frames
from live_migration.common.timescale import Chunk, Hypertable, Layout
from live_migration.producer.ack_tracker import AckTracker
from live_migration.producer.batcher import Record
from live_migration.producer.homes import Homes
from live_migration.producer.router import Router
from tests.fixtures.change_log import LoggedChange, decode_lane, route_reference

LANES = 3
SEGMENT_BYTES = 4096
TOPIC = bytes(range(16))
MIGRATION = "11111111-2222-3333-4444-555555555555"
OIDS = range(16384, 16390)


def put_begin(commit_lsn: int, xid: int = 7) -> bytes:
    return b"B" + struct.pack(">QqI", commit_lsn, 0, xid)


def put_commit(commit_lsn: int) -> bytes:
    return b"C\0" + struct.pack(">QQq", commit_lsn, commit_lsn + 8, 0)


def put_relation(oid: int, name: str = "") -> bytes:
    named = f"public\0{name or f't{oid}'}\0d".encode()
    return b"R" + struct.pack(">I", oid) + named + struct.pack(">HB", 1, 1) + b"id\0" + struct.pack(">Ii", 20, -1)


def put_insert(oid: int, value: bytes) -> bytes:
    return b"I" + struct.pack(">I", oid) + b"N" + struct.pack(">HcI", 1, b"t", len(value)) + value


def put_truncate(oids: Iterable[int], flags: int = 0) -> bytes:
    listed = list(oids)
    return b"T" + struct.pack(f">IB{len(listed)}I", len(listed), flags, *listed)


def put_message(prefix: str, content: str, transactional: bool = True) -> bytes:
    body = content.encode()
    head = struct.pack(">BQ", transactional, 1) + prefix.encode() + b"\0"
    return b"M" + head + struct.pack(">I", len(body)) + body


def lane(oid: int) -> int:
    return lane_of(QualifiedName("public", f"t{oid}"), LANES)


def copy_data(messages: Iterable[bytes]) -> bytes:
    """Give pgoutput messages, and keepalives between them, as the CopyData messages of a stream."""
    copied = [m if m[:1] == b"k" else b"w" + bytes(24) + m for m in messages]
    return b"".join(b"d" + struct.pack(">I", len(each) + 4) + each for each in copied)


def make_router(
    positions: list[Position] | None = None, acks: AckTracker | None = None, homes: Homes | None = None
) -> Router:
    return Router(
        migration_id=MIGRATION,
        topic_id=TOPIC,
        segment_bytes=SEGMENT_BYTES,
        positions=positions or [START] * LANES,
        acks=acks or AckTracker(0),
        homes=homes,
    )


def feed(router: Router, messages: Iterable[bytes]) -> None:
    data = copy_data(messages)
    assert router.drain(data) == len(data)


def values_by_lane(records: Iterable[Record]) -> dict[int, list[bytes]]:
    values: dict[int, list[bytes]] = {each: [] for each in range(LANES)}
    for record in records:
        values[record.lane] += list(record.values)
    return values


def decoded(values: dict[int, list[bytes]]) -> dict[int, list[LoggedChange]]:
    return {each: decode_lane(each, found) for each, found in values.items()}


def keepalive(wal_end: int, *, wants_reply: bool = False) -> bytes:
    return b"k" + struct.pack(">QQB", wal_end, 0, wants_reply)


rows = st.tuples(st.sampled_from(OIDS), st.one_of(st.integers(0, 200), st.integers(3800, 4200), st.just(20_000)))
transactions = st.lists(st.lists(rows, max_size=12), max_size=6)


def stream_of(transactions: list[list[tuple[int, int]]]) -> list[bytes]:
    described: set[int] = set()
    messages = []
    for number, changes in enumerate(transactions):
        commit_lsn = 1000 * (number + 1)
        messages.append(put_begin(commit_lsn))
        for oid, size in changes:
            if oid not in described:
                described.add(oid)
                messages.append(put_relation(oid))
            messages.append(put_insert(oid, b"x" * size))
        messages.append(put_commit(commit_lsn))
    return messages


@settings(max_examples=80, deadline=None)
@given(transactions, st.lists(st.integers(0, 100), max_size=5))
def test_every_change_arrives_once_in_whole_chains_of_bounded_records(
    changes: list[list[tuple[int, int]]], flushes: list[int]
) -> None:
    messages = stream_of(changes)
    router = make_router()
    values: dict[int, list[bytes]] = {each: [] for each in range(LANES)}
    done = 0
    for end in [*sorted(flushes), len(messages)]:
        feed(router, messages[done:end])
        done = max(done, min(end, len(messages)))
        for each, found in values_by_lane(router.take()).items():
            values[each] += found
    assert max((len(value) for found in values.values() for value in found), default=0) <= SEGMENT_BYTES + 66
    assert decoded(values) == route_reference(messages, LANES)
    assert router.change_count == sum(map(len, changes))


@settings(max_examples=80, deadline=None)
@given(transactions, st.integers(0, 100))
def test_a_restart_drops_what_the_log_holds_and_nothing_else(changes: list[list[tuple[int, int]]], crash: int) -> None:
    messages = stream_of(changes)
    first = make_router()
    feed(first, messages[:crash])
    values = values_by_lane(first.take())
    again = make_router(list(first.positions))
    feed(again, messages)
    for each, found in values_by_lane(again.take()).items():
        values[each] += found
    assert decoded(values) == route_reference(messages, LANES)


def test_logical_messages_of_others_count_but_go_nowhere() -> None:
    router = make_router()
    oid = OIDS[0]
    others = put_message("somebody", "x")
    loose = put_message("live_migration", "x", transactional=False)
    row = put_insert(oid, b"1")
    feed(router, [loose, put_begin(50), others, put_relation(oid), row, put_commit(50), loose])
    found = decoded(values_by_lane(router.take()))
    assert [each.position for each in found[lane(oid)]] == [Position(50, 2), Position(50, COMMIT_ORDINAL)]
    assert sum(map(len, found.values())) == 2


def test_a_transaction_without_changes_only_moves_what_may_be_confirmed() -> None:
    acks = AckTracker(0)
    router = make_router(acks=acks)
    heartbeat = WalMessage(kind="heartbeat", migration_id=MIGRATION, id="h").model_dump_json()
    feed(router, [put_begin(50), put_message("live_migration", heartbeat), put_commit(50)])
    assert not router.has_changes
    assert router.pending_bytes == 0
    assert router.take() == []
    assert acks.confirmable_lsn == 58


@pytest.mark.parametrize("migration_id", [MIGRATION, "another"])
def test_our_barrier_goes_into_every_lane(migration_id: str) -> None:
    router = make_router()
    content = WalMessage(kind="barrier", migration_id=migration_id, id="b").model_dump_json()
    barrier = put_message("live_migration", content)
    feed(router, [put_begin(50), barrier, put_commit(50)])
    expected = [LoggedChange(Position(50, 1), barrier), LoggedChange(Position(50, COMMIT_ORDINAL), put_commit(50))]
    for found in decoded(values_by_lane(router.take())).values():
        assert found == (expected if migration_id == MIGRATION else [])


def test_a_truncate_is_split_by_lane_at_one_ordinal() -> None:
    router = make_router()
    feed(router, [put_begin(50), *(put_relation(oid) for oid in OIDS), put_truncate(OIDS, 3), put_commit(50)])
    named = []
    for each, found in decoded(values_by_lane(router.take())).items():
        for change in found:
            if change.message[0] == pgoutput.TRUNCATE:
                truncate = pgoutput.decode_truncate(change.message)
                assert change.position == Position(50, 1)
                assert {lane(oid) for oid in truncate.relation_oids} == {each}
                assert truncate.cascade
                assert truncate.restart_identity
                named += truncate.relation_oids
    assert sorted(named) == list(OIDS)


def test_a_truncate_begins_a_segment_where_there_are_chunks() -> None:
    """It may be of a chunk alone, which stops the lane: a segment is applied whole or not at all."""
    oid = OIDS[0]
    for homes, segments in ((Homes(Layout("2.29.2"), {}), 2), (Homes(None, {}), 1)):
        router = make_router(homes=homes)
        feed(router, [put_begin(50), put_relation(oid), put_insert(oid, b"1"), put_truncate([oid]), put_commit(50)])
        values = values_by_lane(router.take())
        assert len(values[lane(oid)]) == segments
        messages = [change.message for change in decoded(values)[lane(oid)]]
        assert messages == [put_insert(oid, b"1"), put_truncate([oid]), put_commit(50)]


ROOT, CHUNK = QualifiedName("public", "readings"), QualifiedName("store", "rd_1_chunk")
PACKED = QualifiedName("store", "rd_1_chunk_compressed")
HYPERTABLE, CHUNK_OID, PACKED_OID, SETTINGS_OID = range(30000, 30004)
PLAIN_CHUNK = Layout(
    "2.29.2",
    {HYPERTABLE: Hypertable(3, HYPERTABLE, ROOT, "time")},
    {CHUNK_OID: Chunk(CHUNK_OID, CHUNK, HYPERTABLE, "true")},
)
COMPRESSED_CHUNK = Layout(
    "2.29.2", PLAIN_CHUNK.hypertables, PLAIN_CHUNK.chunks, {PACKED_OID: CHUNK_OID}, {PACKED_OID: PACKED}
)


def put_relation_of(oid: int, name: QualifiedName, *columns: str, identity: str = "d") -> bytes:
    listed = b"".join(b"\0" + column.encode() + b"\0" + struct.pack(">Ii", 25, -1) for column in columns or ("id",))
    named = f"{name.schema}\0{name.name}\0{identity}".encode()
    return b"R" + struct.pack(">I", oid) + named + struct.pack(">H", len(columns) or 1) + listed


def put_values(oid: int, *values: bytes) -> bytes:
    listed = b"".join(b"t" + struct.pack(">I", len(value)) + value for value in values)
    return b"I" + struct.pack(">I", oid) + b"N" + struct.pack(">H", len(values)) + listed


def moves(kind: str, *messages: bytes) -> list[bytes]:
    ends = [put_message(f"::timescaledb-{kind}-{end}", "") for end in ("start", "end")]
    return [ends[0], *messages, ends[1]]


def chunk_changes(router: Router) -> list[bytes]:
    """Give the rows and suspects that the lane of the hypertable got."""
    values = values_by_lane(router.take())
    assert not any(found for number, found in values.items() if number != lane_of(ROOT, LANES))
    frames = [each for value in values[lane_of(ROOT, LANES)] for each in iterate_frames(value[HEADER.size :])]
    return [each.message for each in frames if each.kind in (pgoutput.INSERT, SUSPECT)]


def test_a_table_that_a_chunk_is_compressed_into_is_learnt_between_the_markers() -> None:
    """There stands the catalog's row of it, and in no list made before: nobody watches it, so the chunk is suspect, once."""
    router = make_router(homes=Homes(PLAIN_CHUNK, {}))
    settings = QualifiedName("_timescaledb_catalog", "compression_settings")
    described = put_relation_of(SETTINGS_OID, settings, "relid", "compress_relid")
    made = put_values(SETTINGS_OID, CHUNK.sql.encode(), PACKED.sql.encode())
    packed = [put_relation_of(PACKED_OID, PACKED), *[put_insert(PACKED_OID, b"z")] * 20]
    feed(router, [put_begin(50), *moves("compression", described, made, *packed), put_commit(50)])
    feed(router, [put_begin(60), *moves("compression", put_insert(PACKED_OID, b"y")), put_commit(60)])
    assert chunk_changes(router) == [encode_suspect(PACKED_OID)]


def test_a_chunk_that_rows_come_back_to_is_suspect_where_the_stream_does_not_show_their_table() -> None:
    router = make_router(homes=Homes(PLAIN_CHUNK, {}, shows_compression=False))
    described, row = put_relation_of(CHUNK_OID, CHUNK), put_insert(CHUNK_OID, b"1")
    back = moves("decompression", *[row] * 50)
    feed(router, [put_begin(50), described, row, *back, row, *back, row, put_commit(50)])
    assert chunk_changes(router) == [row, encode_suspect(CHUNK_OID), row, encode_suspect(CHUNK_OID), row]


@pytest.mark.parametrize("shows_compression", [True, False])
def test_a_chunk_whose_compressed_rows_are_watched_is_not_suspect(shows_compression: bool) -> None:
    """An UPDATE takes some of its batches apart; the table that they lie in says so first."""
    router = make_router(homes=Homes(COMPRESSED_CHUNK, {}, shows_compression=shows_compression))
    described = [put_relation_of(CHUNK_OID, CHUNK), put_relation_of(PACKED_OID, PACKED, identity="f")]
    row, taken = put_insert(CHUNK_OID, b"1"), b"D" + struct.pack(">I", PACKED_OID) + b"O" + put_insert(0, b"z")[6:]
    feed(router, [put_begin(50), *described, *moves("decompression", taken, *[row] * 50), row, put_commit(50)])
    assert chunk_changes(router) == [row]


def test_a_relation_that_changes_is_described_anew_in_a_segment_of_its_own() -> None:
    """The target may have to be altered between the two shapes: what stands before must be applicable without the rest."""
    router = make_router()
    oid = OIDS[0]
    changed = put_relation(oid).replace(b"id\0", b"ident\0")
    feed(router, [put_begin(50), put_relation(oid), put_insert(oid, b"1"), put_relation(oid), put_insert(oid, b"2")])
    feed(router, [changed, put_insert(oid, b"3"), put_commit(50)])
    before, after = values_by_lane(router.take())[lane(oid)]
    assert before.count(put_relation(oid)) == 1
    assert before.index(put_insert(oid, b"1")) < before.index(put_insert(oid, b"2"))
    assert changed not in before
    assert put_relation(oid) not in after
    assert after.index(changed) < after.index(put_insert(oid, b"3"))
    numbers = [each.position.ordinal for each in decode_lane(lane(oid), [before, after])]
    assert numbers == [1, 2, 3, COMMIT_ORDINAL]


def test_with_one_lane_a_segment_ends_where_a_long_transaction_does() -> None:
    """The target commits there: under a steady stream of long transactions it would find no other place."""
    router = make_router([START])
    oid = OIDS[0]
    for commit_lsn, sizes in ((50, [1000] * 4), (60, [10])):
        inserts = [put_insert(oid, b"x" * size) for size in sizes]
        feed(router, [put_begin(commit_lsn), put_relation(oid), *inserts, put_commit(commit_lsn)])
    ends = [decode_header(value).last for record in router.take() for value in record.values]
    assert Position(50, COMMIT_ORDINAL) in ends


def test_the_key_names_the_table_where_there_is_one() -> None:
    router = make_router()
    oid = OIDS[0]
    beside = next(each for each in range(20000, 30000) if lane(each) == lane(oid))
    feed(router, [put_begin(50), put_relation(oid), put_insert(oid, b"1"), put_commit(50)])
    assert [record.key for record in router.take()] == [f"public.t{oid}".encode()]
    more = [put_insert(oid, b"2"), put_relation(beside), put_insert(beside, b"1")]
    feed(router, [put_begin(60), *more, put_commit(60)])
    assert [record.key for record in router.take()] == [None]


def test_draining_takes_whole_messages_only() -> None:
    oid = OIDS[0]
    whole = copy_data([put_begin(50), put_relation(oid), put_insert(oid, b"x" * 100)])
    rest = copy_data([put_insert(oid, b"y" * 100)])
    for cut in range(len(rest)):
        router = make_router()
        assert router.drain(whole + rest[:cut]) == len(whole)
        assert router.drain(rest) == len(rest)
        assert router.change_count + len(router.take()) == 1
    for cut in range(len(whole)):
        router = make_router()
        taken = router.drain(whole[:cut])
        assert router.drain(whole[taken:]) == len(whole) - taken


runs = st.lists(
    st.tuples(st.sampled_from(OIDS), st.sampled_from((0, 1, 40, 41, 300, 600, None, -1)), st.integers(1, 90)),
    max_size=8,
)
"""Relation, size of each row or None where each has another, -1 where some look like messages of the stream, how many rows."""


@settings(deadline=None, max_examples=60)
@given(st.lists(runs, max_size=4), st.integers())
def test_runs_of_messages_of_one_relation_are_as_each_message_by_itself(
    transactions: list[list[tuple[int, int | None, int]]], seed: int
) -> None:
    rng = random.Random(seed)
    messages: list[bytes] = [put_relation(oid) for oid in OIDS]
    for number, transaction in enumerate(transactions):
        messages.append(put_begin(100 * number + 100))
        for oid, size, count in transaction:
            for _ in range(count):
                value = rng.randbytes(rng.randrange(120) if size is None else max(size, 0))
                if size == -1 and rng.random() < 0.1:
                    value = copy_data([put_insert(oid, b"value")] * rng.randrange(3))
                messages.append(put_insert(oid, value))
        messages.append(put_commit(100 * number + 100))
    one_by_one, at_once = make_router(), make_router()
    for message in messages:
        feed(one_by_one, [message])
    data, at = copy_data(messages), 0
    while at < len(data):
        at += at_once.drain(data[at : at + rng.choice((400, 5_000, 1 << 20))])
    expected, found = values_by_lane(one_by_one.take()), values_by_lane(at_once.take())
    assert at_once.positions == one_by_one.positions
    assert at_once.change_count == one_by_one.change_count
    assert decoded(found) == decoded(expected)
    assert found == expected


def test_draining_stops_where_the_stream_does() -> None:
    data = copy_data([put_begin(50)])
    assert make_router().drain(data + b"c\0\0\0\4" + data) == len(data)


def test_a_view_is_one_message() -> None:
    router = make_router()
    oid = OIDS[0]
    feed(router, [put_begin(50), put_relation(oid)])
    big = copy_data([put_insert(oid, b"x" * 20_000)])
    assert router.drain(memoryview(big)) == len(big)
    feed(router, [put_commit(50)])
    messages = [change.message for change in decoded(values_by_lane(router.take()))[lane(oid)]]
    assert messages == [put_insert(oid, b"x" * 20_000), put_commit(50)]


def test_a_keepalive_confirms_and_may_ask_for_a_reply() -> None:
    acks = AckTracker(0)
    router = make_router(acks=acks)
    feed(router, [keepalive(77)])
    assert acks.confirmable_lsn == 77
    assert not router.is_reply_requested
    feed(router, [keepalive(78, wants_reply=True)])
    assert router.is_reply_requested
    assert router.pending_bytes == 0


@pytest.mark.parametrize("message", [b"?", put_insert(999, b"1"), b"k" + bytes(30), put_begin(1)[:-1]])
def test_what_the_protocol_does_not_know_is_refused(message: bytes) -> None:
    router = make_router()
    with pytest.raises(FormatError):
        router.drain(copy_data([message]))


def test_a_keepalive_behind_the_last_transaction_tells_that_all_is_received() -> None:
    router = make_router()
    transaction = [put_begin(50), put_relation(OIDS[0]), put_insert(OIDS[0], b"x"), put_commit(50)]
    feed(router, [*transaction, keepalive(58)])
    assert router.is_caught_up
    feed(router, transaction[:3])
    assert not router.is_caught_up
    feed(router, [keepalive(58)])
    assert not router.is_caught_up
    feed(router, [put_commit(50), keepalive(58)])
    assert router.is_caught_up
    again = [[put_begin(lsn), put_insert(OIDS[0], b"y" * 100), put_commit(lsn)] for lsn in range(100, 2000, 100)]
    feed(router, [message for each in again for message in each])
    assert not router.is_caught_up
