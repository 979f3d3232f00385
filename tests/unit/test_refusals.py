"""What is said of a refused change, where it stands in a segment or a batch, and letters in pieces."""

from __future__ import annotations

import base64
import random
import struct

import asyncpg
import orjson
import pytest

from live_migration.common import pgoutput
from live_migration.common.errors import UsageError
from live_migration.common.relation import QualifiedName, Relation
from live_migration.common.segment import COMMIT_ORDINAL, HEADER, Position, iterate_frames
from live_migration.consumer.dead_letters import PIECE_BYTES, _pieces, write_letter
from live_migration.consumer.decoder import Batch, TableRun, TruncateStep
from live_migration.consumer.refusal import describe_key, hint_for
from live_migration.consumer.refusal_search import flatten, rebuild
from live_migration.consumer.segment_walk import walk, without
from live_migration.consumer.target_tables import TargetTable
from live_migration.coordinator.dead_letters import LetterJoiner
from live_migration.coordinator.skip import parse_position
from tests.support.segments import INT4, TEXT, Cell, LaneWriter, delete, insert, oid_of, relation, truncate, update


@pytest.mark.parametrize(
    "position", [Position(1, 1), Position(0x16B374D848, 12), Position(2**64 - 1, COMMIT_ORDINAL - 1)]
)
def test_a_position_is_read_as_it_prints(position: Position) -> None:
    assert Position.parse(f" {position}\n") == position


@pytest.mark.parametrize(
    "text", ["", "0/1", "0/1#", "0/1#0", "0/1#commit", "0/1#-1", "1#1", "0/1#1#1", "g/1#1", "0/1/1", "0/1#²"]
)
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a change's position"):
        parse_position(text)


def decoded(columns: list[tuple[str, int, bool]]) -> Relation:
    return pgoutput.decode_relation(relation("t", columns))


@pytest.mark.parametrize(
    ("type_oid", "cell", "shown"),
    [
        (INT4, "5", "5"),
        (INT4, -5, "-5"),
        (TEXT, "a b", '"a b"'),
        (TEXT, 'a"\n', '"a\\"\\n"'),
        (TEXT, "x" * 60, "x" * 60),
        (TEXT, "x" * 61, "x" * 60 + "… (61 bytes)"),
        (TEXT, b"x" * 5_000, "\\x" + "78" * 30 + "… (5000 bytes)"),
        (TEXT, "ü" * 40_000, "ü" * 60 + "… (80000 bytes)"),
        (2950, bytes(16), "00000000-0000-0000-0000-000000000000"),
        (1700, b"\0\xff", "\\x00ff"),
        (TEXT, None, "null"),
    ],
)
def test_a_key_is_shown_readable_and_short(type_oid: int, cell: Cell, shown: str) -> None:
    one = decoded([("k", type_oid, True), ("v", TEXT, False)])
    assert describe_key(insert("t", cell, None), one, None) == f"(k={shown})"


def test_the_old_key_is_shown_where_there_is_one_and_many_columns_are_cut() -> None:
    one = decoded([("k", INT4, True), ("v", TEXT, False)])
    assert describe_key(update("t", "2", "x", key=("1", None)), one, None) == "(k=1)"
    assert describe_key(memoryview(delete("t", "1", None)), one, None) == "(k=1)"
    many = decoded([(f"column_{n}", TEXT, True) for n in range(200)])
    assert len(describe_key(insert("t", *["x" * 50] * 200), many, None)) < 350


def lane_body(*, cut_after: int = 0) -> tuple[list[bytes], list[Position]]:
    lane = LaneWriter(0, bytes(16))
    for name in ("t", "u"):
        lane.describe(name, relation(name, [("id", INT4, True), ("v", TEXT, False)]))
    lsn = lane.next_lsn
    lane.transaction(
        [insert("t", "1", "a"), insert("u", "1", "b"), truncate("t", "u"), update("t", "1", "c")], cut_after=cut_after
    )
    lane.transaction([delete("u", "1", None)])
    lane.cut()
    positions = [*(Position(lsn, n) for n in range(1, 5)), Position(lsn + 0x100, 1)]
    return [record[HEADER.size :] for _, record in lane.take()], positions


@pytest.mark.parametrize("cut_after", [0, 1, 3])
def test_changes_of_a_segment_are_walked_with_their_positions(cut_after: int) -> None:
    bodies, positions = lane_body(cut_after=cut_after)
    found = [change for body in bodies for change in walk(body)]
    assert [change.position for change in found] == positions
    assert [[str(r.name) for r in change.relations] for change in found] == [
        ["public.t"],
        ["public.u"],
        ["public.t", "public.u"],
        ["public.t"],
        ["public.u"],
    ]


@pytest.mark.parametrize("gone", [[], [0], [4], [1, 2], [0, 1, 2, 3, 4]])
def test_what_is_left_of_a_segment_keeps_its_positions(gone: list[int]) -> None:
    (body,), positions = lane_body()
    left = without(body, [change for n, change in enumerate(walk(body)) if n in gone])
    assert [change.position for change in walk(left)] == [p for n, p in enumerate(positions) if n not in gone]
    kinds = [frame.kind for frame in iterate_frames(left)]
    assert kinds.count(pgoutput.BEGIN) == kinds.count(pgoutput.COMMIT) == 2


def table(name: str) -> TargetTable:
    qualified = QualifiedName("public", name)
    described = Relation(oid_of(name), qualified, decoded([("k", INT4, True)]).identity, ())
    return TargetTable(oid_of(name), qualified, described, (), (), False, False, False, True)


def test_a_batch_is_put_into_source_order_and_together_again() -> None:
    """Of two tables, one in two shapes, over many transactions and a truncate."""
    rng = random.Random(5)
    tables = [table("t"), table("u"), table("t")]
    batch, expected = Batch(), []
    for lsn in range(1, 60):
        for each in tables:
            runs = batch.runs().setdefault(each.name, [])
            if not runs or runs[-1].table is not each:
                runs.append(TableRun(each))
            runs[-1].mark(lsn, 10)
        for ordinal in range(1, rng.randrange(1, 6)):
            each = rng.choice(tables[:2])
            run = batch.runs()[each.name][-1]
            message = insert("t", str(lsn), str(ordinal)) if rng.random() < 0.5 else update("t", str(lsn), str(ordinal))
            run.add(message, ordinal)
            run.only_inserts &= message[0] == pgoutput.INSERT
            expected.append((Position(lsn, 10 + ordinal), message))
        if lsn == 30:
            batch.steps.append(TruncateStep(tables[:1], Position(lsn, 100)))
            expected.append((Position(lsn, 100), b""))
    changes = flatten(batch)
    assert [(change.position, change.message) for change in changes] == expected
    for cut in (0, 1, len(changes) // 2, len(changes)):
        for some in (changes[:cut], changes[cut:]):
            made = rebuild(some)
            assert [(c.position, c.message) for c in flatten(made)] == [(c.position, c.message) for c in some]
            for step in made.steps:
                for run in [] if isinstance(step, TruncateStep) else [run for runs in step.values() for run in runs]:
                    assert run.only_inserts == all(message[0] == pgoutput.INSERT for message in run.messages())


def test_letters_are_joined_from_pieces_that_stand_between_one_another() -> None:
    joiner = LetterJoiner()

    def add(letter: bytes, piece: int, value: bytes, *, last: bool = False) -> bytes | None:
        return joiner.add({"letter": letter, "piece": str(piece).encode(), **({"last": b""} if last else {})}, value)

    assert add(b"a", 0, b"A0") is None
    assert add(b"dead", 0, b"D0") is None
    assert add(b"b", 0, b"B0") is None
    assert add(b"a", 1, b"A1") is None
    assert add(b"a", 1, b"A1") is None
    assert add(b"b", 1, b"B1", last=True) == b"B0B1"
    assert add(b"a", 2, b"A2", last=True) == b"A0A1A2"


def test_a_letter_of_any_size_is_json_in_pieces_that_fit_a_record() -> None:
    big = ("💧" + "y" * 1021) * 3000 + "\x01" * 1_000_000  # six times as long in JSON
    lane = LaneWriter(0, bytes(16))
    columns = [("id", INT4, True), ("v", TEXT, False), ("b", 17, False), ("j", 3802, False), ("gone", TEXT, False)]
    lane.describe("t", relation("t", columns))
    raw = random.Random(1).randbytes(1_000_000)
    row = struct.pack(">H", 5)
    for value in (struct.pack(">i", 7), big.encode(), raw, b"\1" + orjson.dumps([big])):
        row += b"b" + struct.pack(">I", len(value)) + value
    lane.transaction([b"U" + struct.pack(">I", oid_of("t")) + b"N" + row + b"u"])
    lane.cut()
    ((_, record),) = lane.take()
    (change,) = walk(record[HEADER.size :])
    pieces = list(_pieces(write_letter({"lane": 0}, change)))
    assert max(len(piece) for piece, _ in pieces) <= PIECE_BYTES
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    letter = orjson.loads(b"".join(piece for piece, _ in pieces))
    assert (letter["op"], letter["position"], letter["lane"]) == ("update", str(change.position), 0)
    new = letter["new"]
    assert (new["id"], new["v"], orjson.loads(new["j"]), new["gone"]) == ("7", big, [big], {"$unchanged": True})
    assert base64.b64decode(new["b"]["$binary"]) == raw


def test_a_value_that_an_enum_of_the_target_lacks_is_told_how_to_be_mended() -> None:
    assert "RENAME VALUE" in hint_for(asyncpg.InvalidTextRepresentationError("invalid input value for enum mood"))
    assert "RENAME VALUE" not in hint_for(asyncpg.UniqueViolationError("duplicate key"))
