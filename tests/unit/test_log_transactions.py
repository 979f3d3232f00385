"""Small transactions of a segment decoded by the hundred: the same batch as frame by frame."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common.home import Home
from live_migration.common.relation import Relation
from live_migration.common.segment import HEADER, SEGMENT, begin_frame, decode_header, frame
from live_migration.common.visibility import CopySnapshot
from live_migration.consumer import decoder as decoder_module
from live_migration.consumer.decoder import Batch, LaneDecoder, TableRun, TruncateStep, all_runs
from live_migration.consumer.refusal_search import flatten
from live_migration.consumer.spans import Span
from live_migration.consumer.target_tables import LaneStopped, RelationRefused, Resolution, TargetTable
from live_migration.consumer.transactions import LogTransactions, find_transactions
from tests.unit.test_plain_changes import make_table
from tests.unit.test_router import (
    MIGRATION,
    OIDS,
    copy_data,
    put_begin,
    put_commit,
    put_insert,
    put_relation,
    put_truncate,
)
from tests.unit.test_stream_transactions import new_router, put_row, random_stream


@pytest.fixture(autouse=True)
def always_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few are taken together, too, which would not be worth it."""
    monkeypatch.setattr(decoder_module, "_WORTH_ROWS_A_TABLE", 0)


class Tables:
    """Gives each relation a table of its own, the last two one together; some have a snapshot, or are refused."""

    def __init__(self, horizon: int = 0, refused: int = 0) -> None:
        self._horizon, self._refused = horizon, refused

    async def resolve(self, relation: Relation, home: Home | None) -> Resolution:
        snapshot = CopySnapshot(5, 9, frozenset(), self._horizon) if self._horizon else None
        if relation.oid == self._refused:
            raise RelationRefused(LaneStopped("no"), relation, snapshot)
        name = replace(relation.name, name="both") if relation.oid in OIDS[2:4] else relation.name
        table: TargetTable = replace(make_table(), name=name, relation=relation)
        return Resolution(table, snapshot)


def bodies_of(messages: list[bytes], segment_bytes: int) -> list[bytes]:
    router, _ = new_router(1, segment_bytes)
    for message in messages:
        router.drain(copy_data([message]))
    values = [value for record in router.take() if record.lane == 0 for value in record.values]
    return [value[HEADER.size :] for value in values if decode_header(value).kind == SEGMENT]


async def decoded(bodies: list[bytes], tables: Tables, segments_a_batch: int) -> tuple[list[object], str]:
    """Give all that is in the batches, and what ended the decoding."""
    decoder = LaneDecoder(tables, MIGRATION)
    found: list[object] = []
    batch = Batch()
    for number, body in enumerate(bodies, 1):
        try:
            await decoder.decode(body, batch)
        except RelationRefused as error:
            return [*found, *content(batch)], str(error)
        if number % segments_a_batch == 0:
            found += [*content(batch), decoder.decoded]
            batch = Batch()
    return [*found, *content(batch), decoder.decoded], ""


def content(batch: Batch) -> list[object]:
    runs = [run for step in batch.steps if not isinstance(step, TruncateStep) for run in all_runs(step)]
    changes = [(change.position, change.message) for change in flatten(batch)]
    by_run = [(run.table.name, run.count, run.only_inserts, run.messages(), run.ordinals()) for run in runs]
    spans = [piece for run in runs for piece in run.pieces() if isinstance(piece, Span)]
    assert all(len({message[:8] for message in span.messages()}) == 1 for span in spans)
    numbers = (batch.change_count, batch.byte_count, batch.run_count, batch.commit_time, batch.is_inside_transaction)
    return [
        changes,
        by_run,
        numbers,
        batch.must_end_at_commit,
        [run.position(run.count - 1) for run in runs if run.count],
    ]


@settings(deadline=None, max_examples=200)
@given(
    st.integers(),
    st.sampled_from((4096, 100_000)),
    st.sampled_from((0.0, 0.01, 0.1)),
    st.sampled_from((0, 1, 20_000_000)),
    st.sampled_from((0, OIDS[1])),
    st.integers(1, 4),
)
async def test_the_batch_is_that_of_frame_by_frame(
    seed: int, segment_bytes: int, others: float, horizon: int, refused: int, segments_a_batch: int
) -> None:
    rng = random.Random(seed)
    messages = random_stream(rng, rng.randrange(1, 150), list(OIDS[: rng.randrange(1, 5)]), others)
    bodies = bodies_of(messages, segment_bytes)
    tables = Tables(horizon, refused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_module, "find_transactions", lambda body, at, end, oids: None)
        expected = await decoded(bodies, tables, segments_a_batch)
    assert await decoded(bodies, tables, segments_a_batch) == expected


async def test_rows_that_the_target_refuses_do_not_take_those_before_along() -> None:
    """Below the horizon they are in the copy, and nobody minds."""
    messages = [put_relation(OIDS[0]), put_relation(OIDS[1])]
    for number in range(1, 101):
        oid = OIDS[1] if number in (1, 95) else OIDS[0]
        messages += [put_begin(100 * number), put_insert(oid, b"%d" % number), put_commit(100 * number)]
    (body,) = bodies_of(messages, 1 << 20)
    batch = Batch()
    with pytest.raises(RelationRefused):
        await LaneDecoder(Tables(horizon=300, refused=OIDS[1]), MIGRATION).decode(body, batch)
    assert batch.change_count == 92


async def test_most_small_transactions_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def watched(body: bytes, at: int, end: int, oids: set[int]) -> LogTransactions | None:
        found = find_transactions(body, at, end, oids)
        taken.append(found.count if found else 0)
        return found

    monkeypatch.setattr(decoder_module, "find_transactions", watched)
    messages = [put_relation(OIDS[0])]
    for number in range(1, 1001):
        messages += [put_begin(100 * number), put_insert(OIDS[0], b"%d" % number), put_commit(100 * number)]
    (body,) = bodies_of(messages, 1 << 20)
    batch = Batch()
    await LaneDecoder(Tables(), MIGRATION).decode(body, batch)
    assert sum(taken) == 999
    assert len(taken) < 8
    (step,) = batch.steps
    assert isinstance(step, dict)
    (run,) = all_runs(step)
    assert run.count == 1000
    assert sum(piece.row_count for piece in run.pieces() if isinstance(piece, Span)) == 999


async def test_where_none_can_be_taken_it_is_not_tried_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    monkeypatch.setattr(decoder_module, "find_transactions", lambda body, at, end, oids: tries.append(at))
    messages = [put_relation(OIDS[0])]
    for number in range(1, 300):
        messages += [put_begin(100 * number), put_insert(OIDS[0], b"1"), put_commit(100 * number)]
    (body,) = bodies_of(messages, 1 << 20)
    await LaneDecoder(Tables(), MIGRATION).decode(body, Batch())
    assert len(tries) == 2


def framed(messages: list[bytes]) -> bytes:
    return b"".join(begin_frame(m, 3) if m[:1] == b"B" else frame(m, m[:1] in b"IUD") for m in messages)


def test_what_is_no_whole_transaction_of_known_rows_ends_them() -> None:
    whole = [put_begin(100), put_insert(OIDS[0], b"x"), put_row(b"D", OIDS[1], b""), put_commit(100)]

    def found_in(messages: list[bytes]) -> int:
        found = find_transactions(b"ahead" + framed(messages), 5, 1 << 20, set(OIDS[:2]))
        return found.count if found else 0

    assert found_in(whole * 3) == 3
    for odd in (
        [put_begin(100), put_insert(OIDS[0], b"x")],
        [put_begin(100), put_insert(OIDS[2], b"x"), put_commit(100)],
        [put_begin(100), put_relation(OIDS[0]), put_commit(100)],
        [put_begin(100), put_truncate([OIDS[0]]), put_commit(100)],
        [put_begin(100), put_begin(100), put_commit(100)],
        [put_insert(OIDS[0], b"x"), put_commit(100)],
        [put_commit(100)],
        [put_begin(100), put_commit(100) + b"x"],
        [put_begin(100) + b"x", put_commit(100)],
    ):
        assert found_in([*whole * 2, *odd, *whole * 2]) == 2, odd
        assert found_in([*odd, *whole * 2]) == 0, odd
    body = framed(whole * 2)
    for cut in range(1, len(body) // 2):
        found = find_transactions(body[:-cut], 0, 1 << 20, set(OIDS[:2]))
        assert found is not None
        assert (found.count, found.end) == (1, len(body) // 2)
    for cut in range(len(body) // 2 + 1, len(body) + 1):
        assert find_transactions(body[: len(body) - cut], 0, 1 << 20, set(OIDS[:2])) is None


@pytest.mark.parametrize(("per_table", "is_taken"), [(8, False), (40, True)])
async def test_few_rows_of_many_tables_are_left_to_the_loop(
    per_table: int, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    messages = [
        put_begin(1),
        *[m for oid in OIDS[:4] for m in (put_relation(oid), put_insert(oid, b"x"))],
        put_commit(1),
    ]
    for number in range(2, 4 * per_table + 2):
        messages += [put_begin(100 * number), put_insert(OIDS[number % 4], b"x" * 20), put_commit(100 * number)]
    (body,) = bodies_of(messages, 1 << 20)
    taken: list[int] = []
    real = TableRun.add_rows
    monkeypatch.setattr(TableRun, "add_rows", lambda run, rows: taken.append(rows.count) or real(run, rows))
    batch = Batch()
    await LaneDecoder(Tables(), MIGRATION).decode(body, batch)
    assert batch.change_count == 4 * per_table + 4
    assert bool(taken) == is_taken
