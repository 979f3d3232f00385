"""The source's timeline, and where it left those before: asked over a replication connection, for nothing else tells."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from live_migration.producer.replication import ReplicationConnection
from live_migration.producer.resume import parse_timeline_history

_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class SourceTimeline:
    """The timeline that a server is on. `left`: the LSN at which each timeline before it was left."""

    system_identifier: str
    timeline: int
    left: dict[int, int]


async def read_timeline(uri: str) -> SourceTimeline:
    """Ask a source for its timeline and the history of it.

    Raises:
        ConnectionLost | SourceError: it cannot be asked, or refuses.
    """
    async with asyncio.timeout(_SECONDS):
        async with await ReplicationConnection.open(uri) as stream:
            row = (await stream.query("IDENTIFY_SYSTEM"))[0]
            timeline = int(row[1] or b"0")
            left = {}
            if timeline > 1:
                ((_, content),) = await stream.query(f"TIMELINE_HISTORY {timeline}")
                left = parse_timeline_history((content or b"").decode(errors="replace"))
            return SourceTimeline((row[0] or b"").decode(), timeline, left)
