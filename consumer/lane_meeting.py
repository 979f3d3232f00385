"""Lanes of one table that wait for one another where order between keys counts: see `common.meeting`.

Whoever waits holds no transaction on the target, nor for more than a moment bytes of the memory that another lane of the consumer wants.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg

from live_migration.common.errors import Fenced, LiveMigrationError, Retry
from live_migration.common.lsn import Lsn
from live_migration.common.meeting import Meeting
from live_migration.common.segment import COMMIT_ORDINAL
from live_migration.consumer.checkpoint import Checkpoint

_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.005, 0.2
"""Between two looks at the others' checkpoints, longer from look to look."""

_ARRIVE = """
    update _live_migration.checkpoints set arrived_lsn = $4::text::pg_lsn where lane = $1 and epoch = $2 and next_offset = $3
"""
_HAVE_ARRIVED = """
    select count(*) = $1 from _live_migration.checkpoints where lane = any($2::int[]) and arrived_lsn >= $3::text::pg_lsn
"""
_HAS_PASSED = """
    select (commit_lsn, ordinal) >= ($2::text::pg_lsn, $3::bigint) from _live_migration.checkpoints where lane = $1
"""


class LanesMeet(LiveMigrationError):
    """The lane has applied all that it may before it waits for other lanes of its table."""

    retry = Retry.RECONNECT

    def __init__(self, meeting: Meeting) -> None:
        others = f"lanes {meeting.lanes[1]} to {meeting.lanes[-1]}" if meeting.is_leader else f"lane {meeting.leader}"
        until = "arrive at" if meeting.is_leader else "passes"
        super().__init__(f"waiting until {others} {until} the transaction at {Lsn(meeting.commit_lsn)}")
        self.meeting = meeting


async def meet(
    target: asyncpg.Connection, held: Checkpoint, meeting: Meeting, gives_up: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until a lane may go on, True, or it gives up, False. `held`: its checkpoint, behind which the meeting comes next.

    Raises:
        Fenced: a successor holds the lane.
    """
    if not meeting.is_leader:
        await _arrive(target, held, meeting)
    seconds = _SHORTEST_SECONDS
    while not await has_met(target, meeting):
        if gives_up():
            return False
        await asyncio.sleep(seconds)
        seconds = min(seconds * 1.5, _LONGEST_SECONDS)
    return True


async def _arrive(target: asyncpg.Connection, held: Checkpoint, meeting: Meeting) -> None:
    status = await target.execute(_ARRIVE, held.lane, held.epoch, held.next_offset, str(Lsn(meeting.commit_lsn)))
    if status != "UPDATE 1":
        raise Fenced(f"lane {held.lane} was taken over by another consumer")


async def has_met(target: asyncpg.Connection, meeting: Meeting) -> bool:
    """Tell whether those that a lane waits for have come so far."""
    lsn = str(Lsn(meeting.commit_lsn))
    if meeting.is_leader:
        siblings = list(meeting.lanes[1:])
        return bool(await target.fetchval(_HAVE_ARRIVED, len(siblings), siblings, lsn))
    return bool(await target.fetchval(_HAS_PASSED, meeting.leader, lsn, COMMIT_ORDINAL))
