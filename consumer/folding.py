"""A run of changes of one table, folded to its net effect: what to delete, update and insert so that the end is the same.

Keys are folded by their bytes, so this is for tables whose key types are equal exactly when their bytes are. Order between
keys is lost; where a second unique index may need it, the caller replays the run in source order instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from live_migration.common import pgoutput
from live_migration.common.errors import FormatError
from live_migration.consumer.row_encoding import UNCHANGED, Message, Value, decode_tuple

Key = tuple[bytes | None, ...]
WholeRow = tuple[bytes | None, ...]

_KEY = ord("K")
_OLD = ord("O")
_NEW = ord("N")


class Change(NamedTuple):
    """A row message, decoded. `old`: the old row or its key columns (others NULL), if the message carries it; `new`: None for a DELETE."""

    kind: int
    old: list[Value] | None
    new: list[Value] | None


def decode_change(message: Message) -> Change:
    """Decode an Insert, Update or Delete message. Raises FormatError where it is malformed."""
    kind = message[0]
    old: list[Value] | None = None
    at = 5
    if message[at : at + 1] in (b"K", b"O"):
        old, at = decode_tuple(message, at + 1)
    if kind == pgoutput.DELETE:
        if old is None:
            raise FormatError("delete message without an old row")
        return Change(kind, old, None)
    if message[at : at + 1] != b"N":
        raise FormatError("row message without a new row")
    new, _ = decode_tuple(message, at + 1)
    if old is not None:
        # a key or, under FULL, an old row is sent whole: it holds what the new row leaves out
        whole = message[5] == _OLD
        for i, value in enumerate(new):
            if value is UNCHANGED and (whole or old[i] is not None):
                new[i] = old[i]
    return Change(kind, old, new)


@dataclass(slots=True)
class NetEffect:
    """What a run comes to. Apply in this order: deletes, updates, inserts.

    `updates` are grouped by which columns are present: column indexes -> rows (key, values of those columns).
    """

    deletes: list[Key] = field(default_factory=list)
    updates: dict[tuple[int, ...], list[tuple[Key, list[bytes | None]]]] = field(default_factory=dict)
    inserts: list[list[bytes | None]] = field(default_factory=list)


class NotFoldable(Exception):
    """The run must be applied in source order: a key changed while a value stayed in the target's old row alone."""


class _State:
    """What became of one key: `existed` before the run; `row` now (None: gone); `replaced`: the old row must go first."""

    __slots__ = ("existed", "replaced", "row")

    def __init__(self, existed: bool, row: list[Value] | None, replaced: bool) -> None:
        self.existed = existed
        self.row = row
        self.replaced = replaced


def fold(messages: Iterable[Message], key_indexes: Sequence[int]) -> NetEffect:
    """Fold row messages of one table, in their order, to their net effect.

    Args:
        messages: Insert, Update and Delete messages of one shape.
        key_indexes: positions of the key's columns.

    Raises:
        NotFoldable: a row whose key changed is not whole.
        FormatError: a message is malformed.
    """
    states: dict[Key, _State] = {}
    for message in messages:
        kind, old, new = decode_change(message)
        if new is None:
            assert old is not None
            _delete(states, _key(old, key_indexes))
        elif kind == pgoutput.INSERT:
            _insert(states, _key(new, key_indexes), new)
        else:
            _update(states, key_indexes, old, new)
    return _net(states, key_indexes)


def _key(row: Sequence[Value], key_indexes: Sequence[int]) -> Key:
    key = tuple([row[i] for i in key_indexes])
    if UNCHANGED in key:
        raise NotFoldable("a key column is not in the stream")
    return key  # type: ignore[return-value]


def _delete(states: dict[Key, _State], key: Key) -> None:
    state = states.get(key)
    if state is None:
        states[key] = _State(True, None, False)
    elif state.row is None:
        raise NotFoldable("a row is deleted twice")
    elif not state.existed:
        del states[key]
    else:
        state.row = None


def _insert(states: dict[Key, _State], key: Key, row: list[Value]) -> None:
    state = states.get(key)
    if state is None:
        states[key] = _State(False, row, False)
    elif state.row is None:
        state.row, state.replaced = row, True
    else:
        raise NotFoldable("a key is inserted twice")  # the server is to say so, with its own words


def _update(states: dict[Key, _State], key_indexes: Sequence[int], old: list[Value] | None, new: list[Value]) -> None:
    old_key = _key(old, key_indexes) if old is not None else _key(new, key_indexes)
    state = states.get(old_key)
    if state is not None and state.row is not None:
        before = state.row
        for i, value in enumerate(new):
            if value is UNCHANGED:
                new[i] = before[i]
    elif state is not None:
        raise NotFoldable("a row is updated after it was deleted")
    new_key = _key(new, key_indexes)
    if new_key == old_key:
        if state is None:
            states[new_key] = _State(True, new, False)
        else:
            state.row = new
        return
    if UNCHANGED in new:
        raise NotFoldable("a row's key changed and the row is not whole")
    _delete(states, old_key)
    _insert(states, new_key, new)


def _net(states: dict[Key, _State], key_indexes: Sequence[int]) -> NetEffect:
    net = NetEffect()
    keys = frozenset(key_indexes)
    for key, state in states.items():
        row = state.row
        if row is None:
            net.deletes.append(key)
        elif not state.existed or state.replaced:
            if state.existed:
                net.deletes.append(key)
            net.inserts.append(row)  # type: ignore[arg-type]
        else:
            present = tuple([i for i, value in enumerate(row) if value is not UNCHANGED and i not in keys])
            values = [row[i] for i in present]
            net.updates.setdefault(present, []).append((key, values))  # type: ignore[arg-type]
    return net


def fold_whole_rows(messages: Iterable[Message]) -> tuple[Counter[WholeRow], Counter[WholeRow]]:
    """Fold changes of a table without key, under REPLICA IDENTITY FULL, to rows to delete and rows to insert, with how often.

    Rows are equal when all their bytes are. Order does not matter any more: rows without a key are a multiset.

    Raises:
        NotFoldable: a row is not whole.
    """
    deletes: Counter[WholeRow] = Counter()
    inserts: Counter[WholeRow] = Counter()
    for message in messages:
        _, old, new = decode_change(message)
        if old is not None:
            _move(_whole(old), inserts, deletes)
        if new is not None:
            _move(_whole(new), deletes, inserts)
    return deletes, inserts


def _move(row: WholeRow, opposite: Counter[WholeRow], own: Counter[WholeRow]) -> None:
    if opposite[row] > 0:
        opposite[row] -= 1
        if not opposite[row]:
            del opposite[row]
    else:
        del opposite[row]
        own[row] += 1


def _whole(row: list[Value]) -> WholeRow:
    if UNCHANGED in row:
        raise NotFoldable("a row is not whole")
    return tuple(row)  # type: ignore[arg-type]
