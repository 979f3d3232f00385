"""Changes of a lane that the user gave up: taken out of what is applied, each only once its letter is in Kafka."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg

from live_migration.common import state
from live_migration.common.errors import LaneStopped
from live_migration.common.lsn import Lsn
from live_migration.common.segment import Position
from live_migration.common.settings import Settings
from live_migration.common.state import Migration
from live_migration.consumer.dead_letters import send_letter, write_letter
from live_migration.consumer.log_reader import Segment
from live_migration.consumer.segment_walk import LoggedChange, walk, without

_WANTED = """
    select commit_lsn - '0/0'::pg_lsn as lsn, ordinal, reason, requested_at from _live_migration.skips
    where lane = $1 and skipped_at is null
"""

_SKIPPED = """
    update _live_migration.skips set skipped_at = clock_timestamp()
    where lane = $1 and commit_lsn = $2::text::pg_lsn and ordinal = $3 and skipped_at is null
    returning relation, kind
"""


@dataclass(frozen=True, slots=True)
class _Request:
    reason: str
    requested_at: datetime


@dataclass(frozen=True, slots=True)
class SkippedChange:
    """A change that was taken out of the segment at `offset`."""

    change: LoggedChange
    offset: int


class LaneSkips:
    """One lane's skips; kept over all attempts of this process, so that one that fails writes no second letter."""

    def __init__(self, settings: Settings, migration: Migration, lane: int) -> None:
        self._settings = settings
        self._migration = migration
        self._lane = lane
        self._wanted: dict[Position, _Request] = {}
        self._lettered: set[Position] = set()

    def __bool__(self) -> bool:
        return bool(self._wanted)

    async def load(self, connection: asyncpg.Connection, after: Position) -> None:
        """Read what is to be skipped `after` the checkpoint; a lane that stands still does so before each attempt."""
        rows = await connection.fetch(_WANTED, self._lane)
        requests = {Position(int(row["lsn"]), row["ordinal"]): row for row in rows}
        self._wanted = {
            position: _Request(row["reason"], row["requested_at"])
            for position, row in requests.items()
            if position > after
        }

    def take_out(self, segment: Segment, skipped: list[SkippedChange]) -> bytes:
        """Give a segment's body without the changes that are to be skipped, and add those to `skipped`."""
        if segment.last < min(self._wanted):
            return segment.body
        found = [change for change in walk(segment.body) if change.position in self._wanted]
        skipped += [SkippedChange(change, segment.next_offset - 1) for change in found]
        return without(segment.body, found) if found else segment.body

    async def send_letters(self, skipped: list[SkippedChange]) -> list[Position]:
        """See that each change's letter is in Kafka, and give their positions."""
        for change, offset in ((each.change, each.offset) for each in skipped):
            if change.position in self._lettered:
                continue
            request = self._wanted[change.position]
            head: dict[str, object] = {
                "migration": str(self._migration.id),
                "lane": self._lane,
                "topic": self._settings.changes_topic,
                "offset": offset,
                "reason": request.reason,
                "requested_at": request.requested_at,
                "written_at": datetime.now(UTC),
            }
            await send_letter(self._settings, str(change.position), write_letter(head, change))
            self._lettered.add(change.position)
        return [each.change.position for each in skipped]

    async def finish(self, connection: asyncpg.Connection, positions: list[Position]) -> None:
        """Record in the transaction of the checkpoint that these changes are skipped.

        Raises:
            LaneStopped: a request is not there any more. Roll back.
        """
        for position in positions:
            row = await connection.fetchrow(_SKIPPED, self._lane, str(Lsn(position.commit_lsn)), position.ordinal)
            if row is None:
                raise LaneStopped(
                    f"the request to skip {position} was withdrawn",
                    hint="The lane goes on by itself, without the skip.",
                )
            message = f"lane {self._lane}: skipped the {row['kind']} of {row['relation']} at {position}"
            await state.record_event(connection, "warning", message)
            del self._wanted[position]
