"""A run of changes of a table with a key, as what is staged of it: the cheapest of three ways that comes to the same end. Pure.

It is the consumer's dearest work, and may be done while the target still applies the batch before.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from live_migration.common.errors import FormatError
from live_migration.consumer.decoder import Batch, TableRun, TruncateStep, all_runs
from live_migration.consumer.folding import NetEffect, NotFoldable, fold
from live_migration.consumer.hypertable_statements import moves_rows
from live_migration.consumer.plain_changes import PlainChanges, plain_changes
from live_migration.consumer.plain_deletes import plain_deletes
from live_migration.consumer.row_encoding import CopyRow, Message, are_binary
from live_migration.consumer.statements import assigns_beside_key, beside_key
from live_migration.consumer.target_tables import TargetTable


class PlainDeletes(NamedTuple):
    """A run of nothing but deletes: the keys as rows of COPY, joined or not, and how many they are."""

    keys: list[CopyRow]
    key_count: int


NetChanges = PlainDeletes | PlainChanges | NetEffect


def net_changes(table: TargetTable, messages: Sequence[Message]) -> NetChanges:
    """Give what a run's messages come to.

    Raises:
        NotFoldable: they must be applied in source order.
        FormatError | struct.error | IndexError: a message is malformed.
    """
    binary = are_binary(messages)
    deletes = plain_deletes(table, messages, binary=binary)
    if deletes is not None:
        return PlainDeletes(deletes, len(messages))
    changes = plain_changes(table, messages, binary=binary) if _stages_whole_rows(table) else None
    return changes or fold(messages, [column.index for column in table.key])


def is_folded(run: TableRun) -> bool:
    """Tell whether a run is applied by its net changes, if it can be."""
    return not run.only_inserts and run.table.is_foldable and bool(run.table.key)


def work_ahead(batch: Batch) -> None:
    """Find out what the runs of a batch come to. Whatever is wrong with one is for who applies it to find again."""
    for step in batch.steps:
        if isinstance(step, TruncateStep):
            continue
        for run in all_runs(step):
            if is_folded(run):
                try:
                    run.net = net_changes(run.table, run.messages())
                except (NotFoldable, FormatError, struct.error, IndexError):
                    continue


def take_net_changes(run: TableRun) -> NetChanges:
    """Give what a run comes to, found ahead or now. It is given away: its rows can be read once. Raises as `net_changes`."""
    net, run.net = run.net, None
    return net or net_changes(run.table, run.messages())


def _stages_whole_rows(table: TargetTable) -> bool:
    """Tell whether an update may assign every column beside the key: there are such, and none moves a row to another chunk."""
    return assigns_beside_key(table) and not moves_rows(table, beside_key(table))
