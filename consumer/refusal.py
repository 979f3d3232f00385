"""A change that the target refuses: what is said of it, and the two ways out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
import orjson

from live_migration.common import pgoutput
from live_migration.common.errors import LaneStopped
from live_migration.common.readable import readable
from live_migration.common.relation import Relation
from live_migration.common.segment import Position
from live_migration.consumer.folding import decode_change
from live_migration.consumer.row_encoding import Message, Value, message_form
from live_migration.consumer.target_tables import RelationRefused, TargetTable

OPERATIONS = {
    pgoutput.INSERT: "INSERT",
    pgoutput.UPDATE: "UPDATE",
    pgoutput.DELETE: "DELETE",
    pgoutput.TRUNCATE: "TRUNCATE",
}

_ENVIRONMENT = frozenset({"08", "25", "28", "40", "53", "55", "57", "58"})
"""Classes of SQLSTATE that no change is to blame for: connections, locks, deadlocks, disk, memory, a server going down."""
_MOST_SAID = 400
_MOST_VALUE = 60
_MOST_KEY = 300


class BatchRefused(LaneStopped):
    """The target refuses one change of several, or a change does not find exactly its row. `reason`: what the target said."""

    def __init__(self, message: str, *, reason: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands in the change log, and where its changes go when they are skipped."""

    topic: str
    lane: int
    offset: int
    dead_letter_topic: str

    def __str__(self) -> str:
        return f"{self.topic}-{self.lane}-{self.offset}"


class ChangeRefused(LaneStopped):
    """The target refuses this one change.

    `operation`: INSERT, UPDATE, DELETE or TRUNCATE; `reason`: what the target said; `hint`: how to mend it. To skip it is always a way.
    `obstructed`: the table's oid on the source where it is a row on the target that is in this one's way.
    """

    def __init__(
        self,
        place: Place,
        position: Position,
        relation: str,
        operation: str,
        key: str,
        reason: str,
        hint: str,
        obstructed: int | None = None,
    ) -> None:
        command = f"live-migration skip --lane {place.lane} --position '{position}'"
        super().__init__(
            f"{relation}: the target refuses the {operation} at {position} in {place}{f', key {key}' if key else ''}: {reason}",
            hint=f"{hint}\n  Or give this change up, the topic {place.dead_letter_topic} then keeps it: {command}",
        )
        self.position = position
        self.relation = relation
        self.operation = operation
        self.reason = reason
        self.obstructed = obstructed

    def as_json(self) -> str:
        """Give what the checkpoint keeps of it."""
        return orjson.dumps(
            {
                "position": str(self.position),
                "relation": self.relation,
                "kind": self.operation,
                "reason": self.reason,
            }
        ).decode()


def is_of_a_change(error: BaseException) -> bool:
    """Tell whether a change is to blame for an error, so that it is worth to look which one."""
    if not isinstance(error, BatchRefused | RelationRefused):
        return False
    cause = error.__cause__
    return not isinstance(cause, asyncpg.PostgresError) or (cause.sqlstate or "")[:2] not in _ENVIRONMENT


def said(error: asyncpg.PostgresError) -> str:
    """Give a server's words, shortened, for they may repeat a value of any size, with the SQLSTATE."""
    detail = f" ({shortened(error.detail, _MOST_SAID)})" if error.detail else ""
    return f"{shortened(str(error.args[0]), _MOST_SAID)}{detail} [SQLSTATE {error.sqlstate}]"


def hint_for(error: asyncpg.PostgresError) -> str:
    """Give how what a server refuses may be mended."""
    if error.sqlstate == asyncpg.InvalidTextRepresentationError.sqlstate:
        return (
            "Where a value of an enum was added or renamed on the source, do the same on the target (ALTER TYPE … ADD VALUE, or RENAME VALUE); the lane then "
            "goes on by itself. Rows with the old name are mended by the rename."
        )
    return error.hint or "Mend the target (or the row that stands in the way); the lane then goes on by itself."


def shortened(text: str, most: int) -> str:
    """Cut a text that is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def describe_key(message: Message, relation: Relation, table: TargetTable | None) -> str:
    """Give the values that identify a row message's row, `(id=5, code=x)`, of bounded length."""
    _, old, new = decode_change(message)
    row = old if old is not None else new
    assert row is not None
    indexes: Sequence[int] = [column.index for column in table.key] if table is not None else ()
    indexes = indexes or relation.key_indexes or range(len(relation.columns))
    binary = bool(message_form(message))
    values = [f"{relation.columns[i].name}={_shown(row[i], relation.columns[i].type_oid, binary)}" for i in indexes]
    return shortened(f"({', '.join(values)})", _MOST_KEY)


def _shown(value: Value, type_oid: int, binary: bool) -> str:
    if value is None:
        return "null"
    if not isinstance(value, bytes | memoryview):
        return "unchanged"
    size = len(value)
    if binary and size <= 4 * _MOST_VALUE and isinstance(found := readable(type_oid, bytes(value)), str):
        text = found
    elif binary:
        text = f"\\x{bytes(value[: _MOST_VALUE // 2]).hex()}"
        return text if size <= _MOST_VALUE // 2 else f"{text}… ({size} bytes)"
    else:
        text = bytes(value[: 4 * _MOST_VALUE]).decode(errors="replace")
    cut = text[:_MOST_VALUE]
    quoted = cut if cut.isalnum() or cut.replace("-", "").replace(".", "").isalnum() else orjson.dumps(cut).decode()
    return quoted if len(cut) == len(text) and size <= 4 * _MOST_VALUE else f"{quoted}… ({size} bytes)"
