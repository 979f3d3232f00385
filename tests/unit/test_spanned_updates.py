"""Updates in spans: the same end as message by message, or left to that. Decoded from a segment as a lane does it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common.home import Home
from live_migration.common.relation import Relation
from live_migration.common.segment import begin_frame, frame
from live_migration.consumer.decoder import Batch, LaneDecoder, TableRun, all_runs
from live_migration.consumer.net_changes import take_net_changes
from live_migration.consumer.plain_changes import PlainChanges, plain_changes, spanned_updates
from live_migration.consumer.row_encoding import UNCHANGED, Value
from live_migration.consumer.spans import SHORTEST_SPAN, Span
from live_migration.consumer.target_tables import Resolution, TargetTable
from tests.support.messages import put_delete, put_insert, put_update
from tests.unit.test_plain_changes import OID, joined, make_table
from tests.unit.test_router import put_begin, put_relation


class OneTable:
    """Resolves whatever relation to a table."""

    def __init__(self, table: TargetTable) -> None:
        self._table = table

    async def resolve(self, relation: Relation, home: Home | None) -> Resolution:
        return Resolution(self._table, None)


def body_of(messages: list[bytes]) -> bytes:
    """Give a segment's body with one transaction of these messages."""
    frames = [begin_frame(put_begin(100), 0), frame(put_relation(OID))]
    return b"".join([*frames, *(frame(message, number) for number, message in enumerate(messages, 1))])


async def run_of(table: TargetTable, messages: list[bytes]) -> TableRun:
    """Give the run that a segment with one transaction of these messages is decoded to."""
    batch = Batch()
    await LaneDecoder(OneTable(table), "").decode(body_of(messages), batch)
    (run,) = runs_of(batch)
    assert run.messages() == messages
    assert run.ordinals() == list(range(1, len(messages) + 1))
    assert (run.count, batch.change_count) == (len(messages), len(messages))
    return run


def runs_of(batch: Batch) -> list[TableRun]:
    (step,) = batch.steps
    assert isinstance(step, dict)
    return list(all_runs(step))


def key(number: int) -> bytes:
    return number.to_bytes(4, "big")


def updates(first: int, sizes: list[int]) -> list[bytes]:
    return [
        put_update(OID, [key(first + number), bytes(size), b"xy"], binary=True) for number, size in enumerate(sizes)
    ]


stretches = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6), st.integers(1, 60)), min_size=1, max_size=6)
"""The first key, the size of the second column, how many rows."""


@settings(deadline=None)
@given(stretches, st.booleans(), st.sampled_from([(0,), (0, 1)]))
async def test_the_end_is_that_of_message_by_message(
    runs: list[tuple[int, int, int]], distinct: bool, keys: tuple[int, ...]
) -> None:
    messages: list[bytes] = []
    for number, (first, size, count) in enumerate(runs):
        messages += updates(first + 1000 * number * distinct, [size] * count)
    table = make_table(keys)
    run = await run_of(table, messages)
    found = take_net_changes(run)
    expected = plain_changes(table, run.messages(), binary=True)
    assert isinstance(found, PlainChanges)
    assert expected is not None
    assert (found.deletes, found.inserts) == ([], [])
    assert found.update_count == expected.update_count
    assert joined(found.updates) == joined(expected.updates)
    are_keys_of_one_size = keys == (0,) or len({size for _, size, _ in runs}) == 1
    if distinct and are_keys_of_one_size and len(messages) > SHORTEST_SPAN:
        assert spanned_updates(table, list(run.pieces())) is not None


async def test_rows_of_all_sizes_are_in_spans_and_others_between_them() -> None:
    other = put_update(OID, [key(300), b"x", b"y"], key=[key(300), None, None], binary=True)
    messages = [*updates(1, [5, 6] * 50), *[other] * 3, *updates(201, [6] * 100)]
    run = await run_of(make_table(), messages)
    pieces = list(run.pieces())
    assert [piece.row_count if isinstance(piece, Span) else len(piece) for piece in pieces] == [100, 3, 100]
    found = spanned_updates(run.table, [pieces[0], updates(101, [1, 2, 3]), pieces[2]])
    assert found is not None
    assert found.update_count == 203


@pytest.mark.parametrize(
    "other",
    [
        updates(17, [3])[0],  # a second time
        put_insert(OID, [key(900), b"x", b"y"], binary=True),
        put_delete(OID, key=[key(900), None, None]),
        put_update(OID, [key(900), UNCHANGED, b"y"], binary=True),
        put_update(OID, [key(900), b"x", b"y"], key=[key(901), None, None], binary=True),
        put_update(OID, [key(900), b"x", b"y"], old=[key(900), b"z", b"y"], binary=True),
        put_update(OID, [None, b"x", b"y"], binary=True),
    ],
)
async def test_what_needs_care_is_left_to_the_messages(other: bytes) -> None:
    run = await run_of(make_table(), [*updates(1, [5] * 100), other])
    assert any(isinstance(piece, Span) for piece in run.pieces())
    assert spanned_updates(run.table, list(run.pieces())) is None


@pytest.mark.parametrize("before", [{"old": [key(900), b"z", b"y"]}, {"key": [key(900), None, None]}])
async def test_spans_with_old_rows_are_left_to_the_messages(before: dict[str, list[Value]]) -> None:
    messages = [put_update(OID, [key(number), b"x", b"y"], binary=True, **before) for number in range(100)]  # type: ignore[arg-type]
    run = await run_of(make_table(), messages)
    assert isinstance(next(run.pieces()), Span)
    assert spanned_updates(run.table, list(run.pieces())) is None


async def test_short_runs_are_not_searched_until_the_next_batch() -> None:
    """A search costs as much as walking over some dozens of rows."""
    short = [*updates(1, [7] * (SHORTEST_SPAN + 1)), put_insert(OID, [key(900), b"x", b"y"], binary=True)]
    decoder, first, second = LaneDecoder(OneTable(make_table()), ""), Batch(), Batch()
    await decoder.decode(body_of(short * 50 + updates(1, [7] * 100)), first)
    await decoder.decode(body_of(updates(1, [7] * 100)), second)
    found = [[type(piece) for piece in run.pieces()] for batch in (first, second) for run in runs_of(batch)]
    assert found[0][0] is Span
    assert found[0].count(Span) < 30
    assert found[0][-1] is list
    assert found[1] == [Span]


async def test_runs_with_other_keys_than_the_first_columns_are_left_to_the_messages() -> None:
    messages = updates(1, [5] * 100)
    for table in (make_table(()), make_table((1,)), make_table(identity="a")):
        assert spanned_updates(table, list((await run_of(table, messages)).pieces())) is None


async def test_inserts_of_one_size_are_no_updates() -> None:
    rows: list[list[Value]] = [[key(number), b"x", b"y"] for number in range(100)]
    inserts = await run_of(make_table(), [put_insert(OID, row, binary=True) for row in rows])
    assert inserts.only_inserts
    assert spanned_updates(inserts.table, list(inserts.pieces())) is None


async def test_a_key_that_is_null_is_left_to_the_messages() -> None:
    messages = [put_update(OID, [key(number), None, b"y"], binary=True) for number in range(100)]
    run = await run_of(make_table((0, 1)), messages)
    assert isinstance(next(run.pieces()), Span)
    assert spanned_updates(run.table, list(run.pieces())) is None


async def test_a_table_that_is_its_key_stages_no_whole_rows() -> None:
    run = await run_of(make_table((0, 1, 2)), updates(1, [5] * 100))
    assert not isinstance(take_net_changes(run), PlainChanges)
