"""What runs come to, found ahead or when they are applied: the same, and given away once."""

from __future__ import annotations

from live_migration.common.relation import QualifiedName
from live_migration.consumer.decoder import Batch, TableRun
from live_migration.consumer.folding import NetEffect
from live_migration.consumer.memory_budget import MemoryBudget
from live_migration.consumer.net_changes import PlainDeletes, take_net_changes, work_ahead
from live_migration.consumer.plain_changes import PlainChanges
from live_migration.consumer.row_encoding import UNCHANGED, Value
from tests.support.messages import put_insert
from tests.unit.test_plain_changes import OID, change, make_table, update

A: list[Value] = [b"0001", b"a", b"x"]
B: list[Value] = [b"0002", b"b", b"y"]


def run_of(*messages: bytes) -> TableRun:
    run = TableRun(make_table())
    run.only_inserts = all(message[:1] == b"I" for message in messages)
    for number, message in enumerate(messages):
        run.add(message, number)
    return run


def batch_of(*runs: TableRun) -> Batch:
    batch = Batch()
    batch.steps.append({QualifiedName("public", f"t{i}"): [run] for i, run in enumerate(runs)})
    return batch


def test_what_was_found_ahead_is_what_is_found_when_it_is_applied() -> None:
    deletes = run_of(change("D", A, (0,), binary=True), change("D", B, (0,), binary=True))
    plain = run_of(update(A, binary=True), put_insert(OID, B, binary=True))
    by_value = run_of(update([b"0001", UNCHANGED, b"z"], binary=True), put_insert(OID, B, binary=True))
    runs = deletes, plain, by_value
    work_ahead(batch_of(*runs))
    found = [run.net for run in runs]
    assert [type(each) for each in found] == [PlainDeletes, PlainChanges, NetEffect]
    assert [take_net_changes(run) for run in runs] == found


def test_it_is_given_away_once_and_found_again() -> None:
    run = run_of(update(A, binary=True))
    work_ahead(batch_of(run))
    first = take_net_changes(run)
    assert run.net is None
    assert take_net_changes(run) == first
    assert take_net_changes(run) is not first


def test_inserts_and_what_cannot_be_folded_are_left_alone() -> None:
    inserts = run_of(put_insert(OID, A, binary=True))
    twice = run_of(put_insert(OID, A, binary=True), put_insert(OID, A, binary=True), update(B, binary=True))
    malformed = run_of(update(A, binary=True)[:-3])
    fine = run_of(update(A, binary=True))
    work_ahead(batch_of(inserts, twice, malformed, fine))
    assert inserts.net is twice.net is malformed.net is None
    assert fine.net is not None


async def test_room_for_it_is_taken_only_where_nobody_waits_for_any() -> None:
    budget = MemoryBudget(100)
    await budget.acquire(40)
    assert not budget.take_if_free(61)
    assert budget.take_if_free(60)
    assert budget.held_bytes == 100
    budget.release(60)
    assert budget.held_bytes == 40
