"""Which change of a batch it is that the target refuses: by halves, on the target itself, inside the batch's transaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import asyncpg

from live_migration.common import pgoutput
from live_migration.common.segment import Position
from live_migration.consumer.applier import Applier
from live_migration.consumer.decoder import Batch, Mark, TableRun, TruncateStep, all_runs
from live_migration.consumer.refusal import OPERATIONS, BatchRefused, ChangeRefused, Place, describe_key, is_of_a_change
from live_migration.consumer.row_encoding import Message

_MEND = "Mend the target (or the row that stands in the way); the lane then goes on by itself."


class BatchedChange(NamedTuple):
    """A row message with its run, or a truncate."""

    position: Position
    of: TableRun | TruncateStep
    message: Message


async def apply_carefully(connection: asyncpg.Connection, applier: Applier, batch: Batch, place: Place) -> None:
    """Apply a batch inside the applier's transaction, and find the change that the target refuses where it does.

    Raises:
        ChangeRefused: this one. Roll back.
        BatchRefused: the target could not do its work, whatever the change.
    """
    await connection.execute("savepoint batch")
    try:
        await applier.apply(batch)
    except BatchRefused as error:
        if not is_of_a_change(error):
            raise
        await connection.execute("rollback to savepoint batch")
        await _apply_by_halves(connection, applier, flatten(batch), place)
    await connection.execute("release savepoint batch")


async def _apply_by_halves(
    connection: asyncpg.Connection, applier: Applier, changes: Sequence[BatchedChange], place: Place
) -> None:
    """Apply changes in pieces that grow smaller around the refused one; whole pieces are as fast as any batch."""
    at, size, refused_end = 0, len(changes), len(changes)
    while at < len(changes):
        piece = changes[at : at + size]
        await connection.execute("savepoint piece")
        try:
            await applier.apply(rebuild(piece))
        except BatchRefused as error:
            if not is_of_a_change(error):
                raise
            if len(piece) == 1:
                raise _refused(piece[0], error, place) from error
            await connection.execute("rollback to savepoint piece")
            refused_end = at + len(piece)
            size = len(piece) // 2
        else:
            at += len(piece)
            left = refused_end - at
            # what is left of a refused piece once its first half went through holds the refused change, most likely
            size = max(1, left // 2) if left > 0 else len(changes) - at
            refused_end = max(refused_end, at)
        await connection.execute("release savepoint piece")


def _refused(change: BatchedChange, error: BatchRefused, place: Place) -> ChangeRefused:
    hint = error.hint if _MEND in error.hint else f"{error.hint} {_MEND}".lstrip()
    if isinstance(change.of, TruncateStep):
        names = ", ".join(str(table.name) for table in change.of.tables)
        return ChangeRefused(place, change.position, names, "TRUNCATE", "", error.reason, hint)
    table = change.of.table
    key = describe_key(change.message, table.relation, table)
    operation = OPERATIONS[change.message[0]]
    is_obstructed = isinstance(error.__cause__, asyncpg.UniqueViolationError | asyncpg.ExclusionViolationError)
    obstructed = table.source_oid if is_obstructed else None
    return ChangeRefused(place, change.position, str(table.name), operation, key, error.reason, hint, obstructed)


def flatten(batch: Batch) -> list[BatchedChange]:
    """Give a batch's changes in the source's order."""
    changes: list[BatchedChange] = []
    for step in batch.steps:
        if isinstance(step, TruncateStep):
            changes.append(BatchedChange(step.position, step, b""))
        else:
            for run in all_runs(step):
                changes += _changes(run)
    changes.sort(key=lambda change: change.position)
    return changes


def _changes(run: TableRun) -> Iterator[BatchedChange]:
    marks = iter([*run.marks(), Mark(run.count + 1, 0, 0)])
    commit_lsn, base = 0, 0
    start, next_lsn, next_base = next(marks)
    for index, (message, ordinal) in enumerate(zip(run.messages(), run.ordinals(), strict=True)):
        while start <= index:
            commit_lsn, base = next_lsn, next_base
            start, next_lsn, next_base = next(marks)
        yield BatchedChange(Position(commit_lsn, base + ordinal), run, message)


def rebuild(changes: Sequence[BatchedChange]) -> Batch:
    """Make a batch of some changes of another, in the source's order."""
    batch = Batch()
    for position, of, message in changes:
        if isinstance(of, TruncateStep):
            batch.steps.append(of)
            continue
        runs = batch.runs().setdefault(of.table.name, [])
        if not runs or runs[-1].table is not of.table:
            runs.append(TableRun(of.table))
        run = runs[-1]
        run.mark(position.commit_lsn, 0)
        run.add(message, position.ordinal)
        run.only_inserts &= message[0] == pgoutput.INSERT
    return batch
