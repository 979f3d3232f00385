"""Who the source is, on which timeline, and where it left those before: asked over a replication connection, for nothing else tells."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from live_migration.common.lsn import Lsn
from live_migration.producer.replication import ReplicationConnection

_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class SystemIdentity:
    """What IDENTIFY_SYSTEM says: which cluster, on which timeline, which database."""

    system_identifier: str
    timeline: int
    database: str


@dataclass(frozen=True, slots=True)
class SourceTimeline:
    """The timeline that a server is on. `left`: the LSN at which each timeline before it was left."""

    timeline: int
    left: dict[int, int]


async def identify(stream: ReplicationConnection) -> SystemIdentity:
    """Ask a server who it is. Raises ConnectionLost | SourceError as the server says."""
    row = (await stream.query("IDENTIFY_SYSTEM"))[0]
    return SystemIdentity((row[0] or b"").decode(), int(row[1] or b"0"), (row[3] or b"").decode())


async def read_history(stream: ReplicationConnection, timeline: int) -> dict[int, int]:
    """Give the LSN at which each timeline before this one, which is not the first, was left."""
    ((_, content),) = await stream.query(f"TIMELINE_HISTORY {timeline}")
    return parse_timeline_history((content or b"").decode(errors="replace"))


async def read_timeline(uri: str) -> SourceTimeline:
    """Ask a source for its timeline and the history of it.

    Raises:
        ConnectionLost | SourceError: it cannot be asked, or refuses.
    """
    async with asyncio.timeout(_SECONDS):
        async with await ReplicationConnection.open(uri) as stream:
            timeline = (await identify(stream)).timeline
            return SourceTimeline(timeline, await read_history(stream, timeline) if timeline > 1 else {})


def parse_timeline_history(text: str) -> dict[int, int]:
    """Read a timeline history file: the LSN at which each former timeline was left.

    Source: PostgreSQL, src/backend/access/transam/timeline.c.
    """
    left = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 2 and fields[0].isdigit():
            left[int(fields[0])] = int(Lsn.parse(fields[1]))
    return left
