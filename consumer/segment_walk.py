"""A segment's frames one by one, for the rare times that one of them is looked for: no message is copied. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from live_migration.common import pgoutput
from live_migration.common.errors import FormatError
from live_migration.common.relation import Relation
from live_migration.common.segment import FRAME, Position, iterate_placed_frames
from live_migration.consumer.refusal import OPERATIONS, ChangeRefused, Place, describe_key
from live_migration.consumer.target_tables import RelationRefused

_ROWS = frozenset((pgoutput.INSERT, pgoutput.UPDATE, pgoutput.DELETE))


class LoggedChange(NamedTuple):
    """A change in a segment's body, whose frame takes the bytes `at` to `end`; `relations` are those that it speaks of."""

    at: int
    end: int
    kind: int
    begin: pgoutput.Begin
    position: Position
    relations: tuple[Relation, ...]
    message: memoryview


def walk(body: bytes) -> Iterator[LoggedChange]:
    """Give the changes of rows and truncates of a segment.

    Raises:
        FormatError: the segment is malformed.
    """
    relations: dict[int, Relation] = {}
    begin = pgoutput.Begin(0, 0, 0)
    for at, (kind, ordinal, message) in iterate_placed_frames(memoryview(body)):
        if kind == pgoutput.BEGIN:
            begin = pgoutput.decode_begin(bytes(message))
        elif kind == pgoutput.RELATION:
            relation = pgoutput.decode_relation(bytes(message))
            relations[relation.oid] = relation
        elif kind in OPERATIONS:
            oids = _relation_oids(kind, message)
            if missing := [oid for oid in oids if oid not in relations]:
                raise FormatError(f"segment has a change at byte {at} before its relation, oid {missing[0]}")
            end, position = at + FRAME.size + len(message), Position(begin.commit_lsn, ordinal)
            yield LoggedChange(at, end, kind, begin, position, tuple(relations[oid] for oid in oids), message)


def _relation_oids(kind: int, message: memoryview) -> tuple[int, ...]:
    if kind == pgoutput.TRUNCATE:
        return pgoutput.decode_truncate(bytes(message)).relation_oids
    return (int.from_bytes(message[1:5], "big"),)


def without(body: bytes, changes: list[LoggedChange]) -> bytes:
    """Give the body without the frames of these changes, which are in its order."""
    view, pieces, at = memoryview(body), [], 0
    for change in changes:
        pieces.append(view[at : change.at])
        at = change.end
    return b"".join([*pieces, view[at:]])


def place_relation(refusal: RelationRefused, body: bytes, place: Place) -> ChangeRefused | None:
    """Give the refusal of the first change in a segment that a refused relation stands in the way of."""
    for change in walk(body):
        if all(relation.oid != refusal.relation.oid for relation in change.relations):
            continue
        if refusal.snapshot is not None and refusal.snapshot.includes(change.begin.commit_lsn, change.begin.xid):
            continue
        key = describe_key(change.message, refusal.relation, None) if change.kind in _ROWS else ""
        name = ", ".join(str(relation.name) for relation in change.relations)
        operation = OPERATIONS[change.kind]
        return ChangeRefused(place, change.position, name, operation, key, refusal.message, refusal.hint)
    return None
