"""What runs come to, found ahead or when they are applied: the same, and given away once."""

from __future__ import annotations

import asyncio
import struct

import pytest

from live_migration.common.errors import FormatError
from live_migration.common.relation import QualifiedName
from live_migration.consumer.decoder import Batch, TableRun
from live_migration.consumer.folding import NetEffect, NotFoldable
from live_migration.consumer.memory_budget import MemoryBudget
from live_migration.consumer.net_changes import NotPlain, PlainDeletes, folded_runs, take_net_changes, work_ahead
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
    work_ahead(folded_runs(batch_of(*runs)))
    assert [type(run.net) for run in runs] == [PlainDeletes, PlainChanges, NotPlain]
    ahead = [take_net_changes(run) for run in runs]
    assert [run.net for run in runs] == [None, None, None]
    now = [take_net_changes(run) for run in runs]
    assert [type(each) for each in now] == [PlainDeletes, PlainChanges, NetEffect]
    assert ahead == now
    assert all(one is not other for one, other in zip(ahead, now, strict=True))


def test_inserts_and_what_cannot_be_folded_are_left_alone() -> None:
    inserts = run_of(put_insert(OID, A, binary=True))
    twice = run_of(put_insert(OID, A, binary=True), put_insert(OID, A, binary=True), update(B, binary=True))
    malformed = run_of(update(A, binary=True)[:-3])
    fine = run_of(update(A, binary=True))
    work_ahead(folded_runs(batch_of(inserts, twice, malformed, fine)))
    assert inserts.net is None
    assert isinstance(twice.net, NotPlain)
    with pytest.raises(NotFoldable):
        take_net_changes(twice)
    assert malformed.net is None
    with pytest.raises((FormatError, struct.error, IndexError)):
        take_net_changes(malformed)
    assert isinstance(fine.net, PlainChanges)


async def test_room_for_it_is_taken_only_where_half_of_all_is_left_and_nobody_waits() -> None:
    budget = MemoryBudget(100)
    await budget.acquire(20)
    assert not budget.take_to_spare(31)
    assert budget.take_to_spare(30)
    assert budget.held_bytes == 50
    budget.release(50)
    await budget.acquire(20)
    waiting = asyncio.ensure_future(budget.acquire(90))
    await asyncio.sleep(0)
    assert budget.is_wanted
    assert not budget.take_to_spare(1)
    budget.release(20)
    await waiting
