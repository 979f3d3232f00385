"""Whether the source, its timeline and the slot allow the stream to go on where the change log ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg

from live_migration.common.control import LogPosition, ProducerConfig
from live_migration.common.errors import RECOPY, ConnectionLost, SlotError, SlotLost, SourceError
from live_migration.common.lsn import Lsn
from live_migration.common.postgres import CONNECTION_ERRORS, describe, server_error, session
from live_migration.common.telemetry import get_logger
from live_migration.producer.replication import ReplicationConnection
from live_migration.producer.timeline import identify, read_history

log = get_logger(__name__)

_TAKE_OVER_SECONDS = 20.0

_SLOT = """
    select s.slot_type, s.plugin, s.database = current_database() as is_here, s.active_pid, s.wal_status,
           (s.confirmed_flush_lsn - '0/0'::pg_lsn)::bigint as confirmed_lsn,
           coalesce(to_jsonb(s) ->> 'invalidation_reason', '') as reason
    from pg_replication_slots s
    where s.slot_name = $1
"""


WAL_END = "case when pg_is_in_recovery() then null else (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint end"
"""Where a primary's WAL ends, null on a standby."""


class TimelineUnknown(ConnectionLost):
    """The source is on a timeline that the coordinator has not named yet."""


async def check_system(stream: ReplicationConnection, config: ProducerConfig, position: LogPosition | None) -> int:
    """Check that this is the server that the log was made from, or its rightful successor; give its timeline.

    Raises:
        SlotError: another server.
        SlotLost: a timeline that left ours below what is in the log.
        TimelineUnknown: one that leads on from ours, and that the coordinator has not compared with the copied tables yet.
    """
    identity = await identify(stream)
    timeline = identity.timeline
    if identity.system_identifier != config.system_identifier:
        raise SlotError(
            f"the source is another server: its system identifier is {identity.system_identifier}, the migration's is {config.system_identifier}",
            hint="Point --source at the server that the migration was begun with.",
        )
    recorded = position.timeline if position else config.timeline
    if timeline != recorded:
        check_timeline(await read_history(stream, timeline), timeline, recorded, published_lsn(config, position))
        log.info("source is on a new timeline", timeline=timeline, before=recorded)
    if timeline != config.timeline:
        raise TimelineUnknown(
            f"the source failed over to timeline {timeline}: waiting for `live-migration migrate`, which compares it with what was "
            f"copied on timeline {config.timeline}"
        )
    return timeline


def published_lsn(config: ProducerConfig, position: LogPosition | None) -> int:
    """Give the WAL position up to which a timeline must be ours: a commit record that the log speaks of is not to lie beyond."""
    if position is None:
        return config.start_lsn
    # a lane's position names where the record begins: a timeline left right there has lost the transaction
    return max(position.confirm_lsn, *(commit_lsn + 1 for commit_lsn, _ in position.lanes))


def check_timeline(history: dict[int, int], timeline: int, recorded: int, published: int) -> None:
    """Raise SlotLost unless timeline `recorded` leads into this one, and was left at or above `published`."""
    hint = f"Changes in the log may not exist on this server. {RECOPY}"
    if recorded not in history:
        raise SlotLost(
            f"the source is on timeline {timeline}, which does not come from timeline {recorded} of the change log",
            hint=hint,
        )
    if history[recorded] < published:
        raise SlotLost(
            f"after a failover the source is on timeline {timeline}: timeline {recorded} was left at "
            f"{Lsn(history[recorded])}, but the change log holds changes up to {Lsn(published)}",
            hint=hint,
        )


def check_wal_end(wal_end: int, published: int) -> None:
    """Raise SlotLost where the source's WAL ends before what was published of it, or copied: its storage went back to an older state.

    System, timeline and slot are as they were then. The server would pass over all that it writes up to there a second time.
    """
    if wal_end < published:
        raise SlotLost(
            f"the source went back to an older state of itself: its WAL ends at {Lsn(wal_end)}, but change log or target hold what it had "
            f"up to {Lsn(published)}",
            hint=f"Was its storage restored, from a snapshot or a backup? {RECOPY}",
        )


async def check_slot(uri: str, config: ProducerConfig, position: LogPosition | None) -> None:
    """Take the slot from a superseded producer, and check that it is ours and not ahead of the log, nor the log ahead of the source.

    Raises:
        SlotError: it is of another kind or database.
        SlotLost: it is gone, lost, or somebody else has read from it; or the source went back to an older state of itself.
        ConnectionLost: the source cannot be reached, or the slot's reader does not end.
    """
    recorded = position.confirm_lsn if position else config.start_lsn
    try:
        async with session(uri, "source", application="live-migration producer") as connection:
            if await connection.fetchval("select pg_is_in_recovery()"):
                raise ConnectionLost("the source is a standby, or recovers: waiting until it is a primary")
            wal_end = await connection.fetchval(f"select {WAL_END}")
            slot = await _free_slot(connection, config.slot)
    except (*CONNECTION_ERRORS, asyncpg.InterfaceError) as error:
        raise ConnectionLost(f"the source at {describe(uri)} cannot be asked about its slot: {error!r}") from error
    except asyncpg.PostgresError as error:
        raise server_error(error, "source", f"looking at slot {config.slot}") from error
    assess_slot(config.slot, slot, recorded)
    check_wal_end(wal_end, published_lsn(config, position))


def assess_slot(name: str, slot: asyncpg.Record | dict[str, object] | None, recorded: int) -> None:
    """Raise SlotError unless a row of `pg_replication_slots` shows a slot that can go on at `recorded`."""
    if slot is None:
        raise SlotLost(f"replication slot {name} does not exist on the source: changes since its loss are lost")
    if slot["slot_type"] != "logical" or slot["plugin"] != "pgoutput":
        raise SlotError(f"replication slot {name} is not a logical slot of pgoutput")
    if not slot["is_here"]:
        raise SlotError(
            f"replication slot {name} belongs to another database",
            hint="Give the database that the migration began with.",
        )
    if slot["wal_status"] == "lost" or slot["reason"]:
        raise SlotLost(
            f"replication slot {name} is lost: the source has removed WAL that it needed {slot['reason'] or ''}".rstrip(),
            hint=f"Raise max_slot_wal_keep_size on the source. {RECOPY}",
        )
    confirmed = slot["confirmed_lsn"]
    if not isinstance(confirmed, int) or confirmed > recorded:
        raise SlotLost(
            f"replication slot {name} is ahead of the log: confirmed up to "
            f"{Lsn(confirmed) if isinstance(confirmed, int) else 'nowhere'}, the log ends at {Lsn(recorded)}; "
            "somebody else has read from it or made it anew, or the broker has lost the log's tail",
        )


async def _free_slot(connection: asyncpg.Connection, name: str) -> asyncpg.Record | None:
    """Give the slot's row as soon as nobody reads it.

    Whoever reads it was fenced in Kafka before we came here: it can only be a superseded producer of ours.
    """
    seen_pid: int | None = None
    try:
        async with asyncio.timeout(_TAKE_OVER_SECONDS):
            while True:
                slot = await connection.fetchrow(_SLOT, name)
                if slot is None or slot["active_pid"] is None:
                    return slot
                if slot["active_pid"] == seen_pid:  # else it may be our own last one, about to end
                    log.warning("ending the walsender that still reads the slot", slot=name, pid=seen_pid)
                    await connection.execute("select pg_terminate_backend($1)", seen_pid)
                seen_pid = slot["active_pid"]
                await asyncio.sleep(0.2)
    except TimeoutError as error:
        raise ConnectionLost(
            f"replication slot {name} is still read by another walsender after {_TAKE_OVER_SECONDS:.0f} s",
            hint="Find it in pg_stat_replication and end it.",
        ) from error


def stream_options(config: ProducerConfig, quoted_publications: Sequence[str]) -> dict[str, str]:
    """Give pgoutput's options, which are fixed for a migration's life."""
    options = {"proto_version": "1", "publication_names": ",".join(quoted_publications), "messages": "true"}
    if config.binary:
        options["binary"] = "true"
    return options


def explain_repeated_failure(lsn: int, times: int, reason: str) -> SourceError:
    """Give the error for a stream that the server ended several times at the same LSN."""
    return SourceError(
        f"the source cannot stream the changes after {Lsn(lsn)}; it failed {times} times there: {reason}",
        hint="The source's log tells the table. A value that is too big as text, bytes that are not text in the "
        "database's encoding, or a type without binary output stop decoding: mend the cause or take the table out "
        "of the publication, then start the producer again. What the source itself cannot decode (could not map filenumber) needs "
        f"another slot. {RECOPY}",
    )
