"""A run of changes of a table with a key, as what is staged of it: the cheapest of three ways that comes to the same end. Pure.

It is the consumer's dearest work, and may be done while the target still applies the batch before.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

from live_migration.common.errors import FormatError
from live_migration.consumer.decoder import Batch, TableRun, TruncateStep, all_runs
from live_migration.consumer.folding import NetEffect, fold
from live_migration.consumer.hypertable_statements import moves_rows
from live_migration.consumer.plain_changes import PlainChanges, plain_changes, spanned_updates
from live_migration.consumer.plain_deletes import plain_deletes
from live_migration.consumer.row_encoding import CopyRow
from live_migration.consumer.statements import assigns_beside_key, beside_key
from live_migration.consumer.target_tables import TargetTable


class PlainDeletes(NamedTuple):
    """A run of nothing but deletes: the keys as rows of COPY, joined or not, and how many they are."""

    keys: list[CopyRow]
    key_count: int


class NotPlain(enum.Enum):
    """A run that has to be folded by its values, which takes several times its messages' memory: not ahead."""

    NOT_PLAIN = enum.auto()


Plain = PlainDeletes | PlainChanges


def take_net_changes(run: TableRun) -> Plain | NetEffect:
    """Give what a run comes to, found ahead or now. It is given away: its rows can be read once.

    Raises:
        NotFoldable: it must be applied in source order.
        FormatError | struct.error | IndexError: a message is malformed.
    """
    net, run.net = run.net or _plain(run), None
    return fold(run.messages(), [column.index for column in run.table.key]) if isinstance(net, NotPlain) else net


def folded_runs(batch: Batch) -> list[TableRun]:
    """Give the runs that are applied by their net changes, if they can be."""
    return [
        run
        for step in batch.steps
        if not isinstance(step, TruncateStep)
        for run in all_runs(step)
        if not run.only_inserts and run.table.is_foldable
    ]


def work_ahead(runs: Sequence[TableRun]) -> None:
    """Find out what runs come to, about as many bytes as they are. What is wrong with one is for who applies it to find again."""
    for run in runs:
        try:
            run.net = _plain(run)
        except (FormatError, struct.error, IndexError):
            continue


def _plain(run: TableRun) -> Plain | NotPlain:
    table = run.table
    pieces, binary = list(run.pieces()), run.is_binary()
    if _stages_whole_rows(table) and (updates := spanned_updates(table, pieces)) is not None:
        return updates
    deletes = plain_deletes(table, pieces, binary=binary)
    if deletes is not None:
        return PlainDeletes(deletes, run.count)
    changes = plain_changes(table, run.messages(), binary=binary) if _stages_whole_rows(table) else None
    return changes or NotPlain.NOT_PLAIN


def _stages_whole_rows(table: TargetTable) -> bool:
    """Tell whether an update may assign every column beside the key: there are such, and none moves a row to another chunk."""
    return assigns_beside_key(table) and not moves_rows(table, beside_key(table))
