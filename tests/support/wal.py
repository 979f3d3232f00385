"""Real pgoutput messages without a producer: read from a slot by SQL, framed as segments are."""

from __future__ import annotations

import asyncpg

from live_migration.common import pgoutput, segment

_CHANGES = frozenset((pgoutput.INSERT, pgoutput.UPDATE, pgoutput.DELETE, pgoutput.TRUNCATE, pgoutput.MESSAGE))


async def read_messages(connection: asyncpg.Connection, slot: str, publications: str, *, binary: bool) -> list[bytes]:
    """Take every message that the slot has."""
    rows = await connection.fetch(
        """select data from pg_logical_slot_get_binary_changes($1, null, null, 'proto_version', '1', 'publication_names', $2,
                                                              'messages', 'true', 'binary', $3)""",
        slot,
        publications,
        str(binary).lower(),
    )
    return [row["data"] for row in rows]


def segment_bodies(messages: list[bytes], *, most_changes: int) -> list[bytes]:
    """Frame messages as one lane's segments of at most so many changes each, self-contained as a producer's are."""
    bodies: list[bytes] = []
    relations: dict[int, bytes] = {}
    begin: bytes | None = None
    ordinal = count = 0
    parts: list[bytes] = []
    sent: set[int] = set()

    def cut() -> None:
        nonlocal parts, count
        if parts:
            bodies.append(b"".join(parts))
        parts, count = [segment.begin_frame(begin, 0)] if begin else [], 0
        sent.clear()

    for message in messages:
        kind = message[0]
        if kind == pgoutput.BEGIN:
            begin, ordinal = message, 0
            parts.append(segment.begin_frame(message, 0))
        elif kind == pgoutput.COMMIT:
            begin = None
            parts.append(segment.frame(message))
        elif kind == pgoutput.RELATION:
            relations[pgoutput.relation_oid(message)] = message
            sent.discard(pgoutput.relation_oid(message))
        elif kind in _CHANGES:
            if count >= most_changes:
                cut()
            ordinal += 1
            count += 1
            oids: tuple[int, ...] = ()
            if kind == pgoutput.TRUNCATE:
                oids = pgoutput.decode_truncate(message).relation_oids
            elif kind != pgoutput.MESSAGE:
                oids = (pgoutput.relation_oid(message),)
            for oid in oids:
                if oid not in sent:
                    parts.append(segment.frame(relations[oid]))
                    sent.add(oid)
            parts.append(segment.frame(message, ordinal))
    cut()
    return bodies
