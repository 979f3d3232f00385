"""A lane's checkpoint on the target: who may apply the lane, and how far it is applied.

An owner is known by its epoch. Its successor ends the owner's recorded backend and raises the epoch; an owner
that wakes up later hits no row any more and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import asyncpg

from live_migration.common.errors import Fenced, TargetError
from live_migration.common.lsn import Lsn
from live_migration.common.pgoutput import timestamp
from live_migration.common.postgres import terminate_backend
from live_migration.common.segment import Position

_IS_APPLIED = """exists (select from _live_migration.migration m
                          where m.topic_id = ${} and m.phase in ('replay', 'cutover') and m.cutover_lsn is null)"""
"""Whether lanes are applied at all, from this incarnation of the change log: not behind the last barrier."""

_OWNER = """
    select c.epoch, c.owner, c.backend_pid, c.backend_start,
           exists (select from pg_stat_activity a
                   where a.pid = c.backend_pid and a.backend_start = c.backend_start) as is_connected
    from _live_migration.checkpoints c where c.lane = $1
"""

_ACQUIRE = f"""
    update _live_migration.checkpoints
    set epoch = epoch + 1, owner = $2, backend_pid = pg_backend_pid(),
        backend_start = (select backend_start from pg_stat_activity where pid = pg_backend_pid())
    where lane = $1 and epoch = $3 and {_IS_APPLIED.format(4)}
    returning epoch, next_offset, commit_lsn - '0/0'::pg_lsn as commit_lsn, ordinal
"""

_ADVANCE = """
    update _live_migration.checkpoints
    set next_offset = $4, commit_lsn = $5::text::pg_lsn, ordinal = $6, barrier = coalesce($7, barrier),
        change_count = change_count + $8, byte_count = byte_count + $9, commit_time = coalesce($10, commit_time),
        updated_at = clock_timestamp(), error = null, hint = null, refused = null
    where lane = $1 and epoch = $2 and next_offset = $3
"""

_RECORD_ERROR = """
    update _live_migration.checkpoints set error = $3, hint = $4, refused = $5::text::jsonb, updated_at = clock_timestamp()
    where lane = $1 and epoch = $2
"""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a lane goes on, and the epoch in which we hold it."""

    lane: int
    epoch: int
    next_offset: int
    position: Position


@dataclass(frozen=True, slots=True)
class Advance:
    """How far a target transaction brings a lane. `commit_time`: µs since 2000-01-01 UTC."""

    next_offset: int
    position: Position
    barrier: str | None
    change_count: int
    byte_count: int
    commit_time: int | None


async def is_taken_over(connection: asyncpg.Connection, lane: int, owner: str) -> bool:
    """Tell whether somebody else holds the lane, with a session that lives."""
    row = await connection.fetchrow(_OWNER, lane)
    return row is not None and row["owner"] not in (None, owner) and row["is_connected"]


async def acquire(connection: asyncpg.Connection, lane: int, owner: str, topic_id: UUID) -> Checkpoint:
    """Take the lane for this session, whoever held it; the backend of the one before is ended first.

    `topic_id`: the incarnation of the change log that the caller will apply it from.

    Raises:
        Fenced: lanes are not applied now, or from another incarnation of the change log: tables are copied again.
        TargetError: the migration has no such lane.
    """
    while True:
        row = await connection.fetchrow(_OWNER, lane)
        if row is None:
            raise TargetError(f"lane {lane} has no checkpoint on the target", hint="Was the migration cleaned?")
        if row["is_connected"] and row["backend_pid"] != connection.get_server_pid():
            await terminate_backend(connection, row["backend_pid"], row["backend_start"])
        if not await connection.fetchval(f"select {_IS_APPLIED.format(1)}", topic_id):
            raise Fenced(f"lane {lane} is not applied from this change log now")
        taken = await connection.fetchrow(_ACQUIRE, lane, owner, row["epoch"], topic_id)
        if taken is not None:
            position = Position(int(taken["commit_lsn"]), taken["ordinal"])
            return Checkpoint(lane, taken["epoch"], taken["next_offset"], position)


async def advance(connection: asyncpg.Connection, checkpoint: Checkpoint, by: Advance) -> Checkpoint:
    """Move the lane within the transaction that applies its changes, and give the checkpoint that its COMMIT makes true.

    Raises:
        Fenced: a successor holds the lane; roll back.
    """
    commit_time = None if by.commit_time is None else timestamp(by.commit_time)
    status = await connection.execute(
        _ADVANCE,
        checkpoint.lane,
        checkpoint.epoch,
        checkpoint.next_offset,
        by.next_offset,
        str(Lsn(by.position.commit_lsn)),
        by.position.ordinal,
        by.barrier,
        by.change_count,
        by.byte_count,
        commit_time,
    )
    if status != "UPDATE 1":
        raise Fenced(f"lane {checkpoint.lane} was taken over by another consumer")
    return Checkpoint(checkpoint.lane, checkpoint.epoch, by.next_offset, by.position)


async def confirm(connection: asyncpg.Connection, checkpoint: Checkpoint) -> None:
    """Hold the lane to the end of a transaction that changes what it applies to, but does not move it.

    Raises:
        Fenced: a successor holds the lane; roll back.
    """
    status = await connection.execute(
        """update _live_migration.checkpoints set error = null, hint = null, refused = null
           where lane = $1 and epoch = $2 and next_offset = $3""",
        checkpoint.lane,
        checkpoint.epoch,
        checkpoint.next_offset,
    )
    if status != "UPDATE 1":
        raise Fenced(f"lane {checkpoint.lane} was taken over by another consumer")


async def record_error(
    connection: asyncpg.Connection, lane: int, epoch: int, message: str, hint: str, refused: str | None
) -> None:
    """Show why the lane stands still, unless a successor holds it; its next applied batch clears it.

    `refused`: the change that could be skipped, as JSON (`ChangeRefused.as_json`).
    """
    await connection.execute(_RECORD_ERROR, lane, epoch, message, hint, refused)
