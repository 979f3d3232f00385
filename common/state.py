"""The migration's state in the schema `_live_migration` on the target: creation, the migration's row, phases, workers.

Claims on tables, parts and indexes are the consumer's (`live_migration.consumer.claims`), checkpoints too (`.checkpoint`).
Each statement names the schema, for our sessions have an empty search path.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from importlib.resources import files
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import psutil

from live_migration.common.errors import Fenced, TargetError
from live_migration.common.lanes import LaneMap, parse_lanes
from live_migration.common.postgres import terminate_backend

SCHEMA = "_live_migration"
CHANNEL = "_live_migration"
"""NOTIFY channel: told whenever a phase or a request changes."""


class Phase(Enum):
    """The phases of a migration, in order; only the coordinator moves them."""

    PREPARE = "prepare"
    SCHEMA = "schema"
    COPY = "copy"
    REPLAY = "replay"
    CUTOVER = "cutover"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Migration:
    """The one row of `_live_migration.migration`. LSNs are integers."""

    id: UUID
    name: str
    phase: Phase
    settings: dict[str, Any]
    kafka: str
    source_address: str
    source_system: str
    source_timeline: int
    source_database: str
    source_version: int
    topic_id: UUID
    lane_count: int
    binary_stream: bool | None
    start_lsn: int | None
    publication_change: int
    cutover_lsn: int | None
    created_at: datetime
    phase_at: datetime
    owner: str | None
    epoch: int

    @property
    def lane_map(self) -> LaneMap:
        """The change log's lanes."""
        split = parse_lanes(self.settings.get("lanes") or ())
        return LaneMap(self.lane_count - sum(count for _, count in split), split)


def worker_id(kind: str) -> str:
    """Give a name for this process as a worker, never used before: kind, host, pid and a random tail."""
    return f"{kind}-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:6]}"


def session_tag(owner: str) -> str:
    """Give what the application_name of each session of a coordinator ends with, on either side, by which its successor finds them."""
    return f"#{owner.rpartition('-')[2]}"


async def exists(connection: asyncpg.Connection) -> bool:
    """Tell whether the target holds a migration's state."""
    return bool(await connection.fetchval("select to_regclass('_live_migration.migration') is not null"))


async def create_schema(connection: asyncpg.Connection) -> None:
    """Create the schema `_live_migration` with its empty tables; run it inside a transaction."""
    await connection.execute(files("live_migration.common").joinpath("sql/state.sql").read_text())


async def read_migration(connection: asyncpg.Connection) -> Migration | None:
    """Give the migration, or None where the target holds none."""
    if not await exists(connection):
        return None
    row = await connection.fetchrow("select * from _live_migration.migration")
    if row is None:
        return None
    fields = {name: row[name] for name in Migration.__slots__}
    fields["phase"] = Phase(fields["phase"])
    fields["settings"] = json.loads(fields["settings"])
    return Migration(**fields)


async def require_migration(connection: asyncpg.Connection) -> Migration:
    """Give the migration. Raises TargetError where there is none."""
    migration = await read_migration(connection)
    if migration is None:
        raise TargetError("the target holds no migration", hint="`live-migration migrate` starts one; check TARGET.")
    return migration


_SESSIONS = """
    select pid, backend_start from pg_stat_activity
    where datname = current_database() and usename = current_user and pid <> pg_backend_pid()
      and starts_with(application_name, 'live-migration ') and right(application_name, length($1::text)) = $1::text
"""


async def end_sessions(connection: asyncpg.Connection, owner: str) -> None:
    """End the sessions of a coordinator on the server that is asked: it may have been stopped within a transaction."""
    for other in await connection.fetch(_SESSIONS, session_tag(owner)):
        await terminate_backend(connection, other["pid"], other["backend_start"])


async def acquire_coordinator_lease(
    connection: asyncpg.Connection,
    owner: str,
    lease_seconds: float,
    *,
    end_elsewhere: Callable[[str], Awaitable[None]] | None = None,
) -> int:
    """Become the migration's coordinator and give the new epoch; a predecessor whose lease ran out is ended first, with all its sessions.

    One that was stopped within a transaction keeps the migration's row locked, else, and everybody would wait for it. `end_elsewhere` ends
    those on the source: before the predecessor's name is written over, so that whoever comes after one that dies here knows it, too.

    Raises:
        TargetError: another coordinator is alive.
    """
    row = await connection.fetchrow(
        """select owner, backend_pid, backend_start, lease_until > clock_timestamp() as alive,
                  exists (select from pg_stat_activity a
                          where a.pid = m.backend_pid and a.backend_start = m.backend_start) as connected
           from _live_migration.migration m"""
    )
    if row["owner"] and row["alive"] and row["connected"] and row["owner"] != owner:
        raise TargetError(
            f"this migration is already being run by {row['owner']}",
            hint="Stop that one first, or wait until its lease has run out; `live-migration status` shows it.",
        )
    if row["backend_pid"] and row["connected"]:
        await terminate_backend(connection, row["backend_pid"], row["backend_start"])
    if row["owner"]:
        await end_sessions(connection, row["owner"])
        if end_elsewhere is not None:
            await end_elsewhere(row["owner"])
    epoch: int | None = await connection.fetchval(
        """update _live_migration.migration
           set owner = $1, epoch = epoch + 1, backend_pid = pg_backend_pid(),
               backend_start = (select backend_start from pg_stat_activity where pid = pg_backend_pid()),
               lease_until = clock_timestamp() + make_interval(secs => $2)
           where owner is not distinct from $3 or not coalesce(lease_until > clock_timestamp(), false)
           returning epoch""",
        owner,
        lease_seconds,
        row["owner"],
    )
    if epoch is None:
        raise TargetError("another coordinator took this migration over just now", hint="Stop one of the two.")
    return epoch


async def renew_coordinator_lease(connection: asyncpg.Connection, epoch: int, lease_seconds: float) -> None:
    """Extend our lease. Raises Fenced when a successor has it."""
    status = await connection.execute(
        "update _live_migration.migration set lease_until = clock_timestamp() + make_interval(secs => $2) where epoch = $1",
        epoch,
        lease_seconds,
    )
    if status != "UPDATE 1":
        raise Fenced("another coordinator runs this migration now")


async def release_coordinator_lease(connection: asyncpg.Connection, epoch: int) -> None:
    """Give the role up, so that the next coordinator need not wait."""
    await connection.execute(
        "update _live_migration.migration set owner = null, backend_pid = null, lease_until = null where epoch = $1",
        epoch,
    )


async def set_phase(connection: asyncpg.Connection, epoch: int, phase: Phase) -> None:
    """Enter a phase and wake everybody. Raises Fenced when we are not the coordinator any more."""
    status = await connection.execute(
        "update _live_migration.migration set phase = $2, phase_at = clock_timestamp() where epoch = $1",
        epoch,
        phase.value,
    )
    if status != "UPDATE 1":
        raise Fenced("another coordinator runs this migration now")
    await notify(connection)


async def notify(connection: asyncpg.Connection) -> None:
    """Wake everybody who listens for phases and requests."""
    await connection.execute(f"notify {CHANNEL}")


async def heartbeat(connection: asyncpg.Connection, worker: str, kind: str, *, error: str | None = None) -> None:
    """Say that a worker lives, with its resident memory."""
    await connection.execute(
        """insert into _live_migration.workers (id, kind, host, pid, rss_bytes, error) values ($1, $2, $3, $4, $5, $6)
           on conflict (id) do update
           set seen_at = clock_timestamp(), rss_bytes = excluded.rss_bytes, error = excluded.error""",
        worker,
        kind,
        socket.gethostname(),
        os.getpid(),
        psutil.Process().memory_info().rss,
        error,
    )


async def record_event(connection: asyncpg.Connection, level: str, message: str) -> None:
    """Keep a line for `status` and for later."""
    await connection.execute("insert into _live_migration.events (level, message) values ($1, $2)", level, message)
