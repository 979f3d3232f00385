"""Whether slot, publications, change log and checkpoints still fit together, and what must be copied again where they do not."""

from __future__ import annotations

import asyncio
import sys
import time

import asyncpg

from live_migration.common.catalog import CURRENT_TIMELINE
from live_migration.common.control import CONFIG, POSITION, LogPosition, ProducerConfig
from live_migration.common.errors import ConnectionLost, LiveMigrationError, LogGap, PublicationLost, SlotLost
from live_migration.common.kafka import ControlReader, check_topics
from live_migration.common.lsn import Lsn
from live_migration.common.postgres import asking, describe
from live_migration.common.progress import name_list
from live_migration.common.segment import START, Position
from live_migration.common.settings import Settings
from live_migration.coordinator.control_topic import producer_config
from live_migration.coordinator.memberships import require_publications
from live_migration.coordinator.run import Run
from live_migration.producer.resume import WAL_END, check_timeline, check_wal_end, published_lsn
from live_migration.producer.slot import SlotState, read_slot
from live_migration.producer.tail_check import LaneTail, check_tails, read_tails
from live_migration.producer.timeline import read_timeline

_MARKERS_SECONDS = 10.0
_WAL_END = f"select case when pg_is_in_recovery() then null else {CURRENT_TIMELINE} end, {WAL_END}"
# A copy counts once the source has flushed what its snapshot saw; the moments of all else may have been undone by a crash.
_COPIED = """
    select max(horizon) from _live_migration.tables
    where kind = 'table' and newcomer is null and state in ('copied', 'ready') and timeline = $1
"""


def slot_loss(name: str, slot: SlotState | None) -> str | None:
    """Say what became of a slot that cannot be read any more; None when nothing did."""
    if slot is None:
        return f"replication slot {name} does not exist on the source any more: somebody dropped it, or a failover left it behind"
    if slot.wal_status == "lost" or slot.reason:
        why = f" ({slot.reason})" if slot.reason else ""
        return f"replication slot {name} is lost{why}: the source has removed WAL that it needed"
    return None


async def require_primary(settings: Settings, source: asyncpg.Connection) -> None:
    """Raise ConnectionLost where SOURCE leads to a standby just now: it has no slot of ours, and that is no loss."""
    if await source.fetchval("select pg_is_in_recovery()"):
        raise ConnectionLost(f"the source at {describe(settings.source_uri())} is a standby just now")


async def find_loss(run: Run) -> LiveMigrationError | None:
    """Look whether slot, publications, change log and checkpoints still fit together; give what is lost, with the tables to copy again named.

    May be asked in phases schema to cutover, at a coordinator's start.

    Raises:
        ConnectionLost | SourceError | KafkaError: they cannot be asked just now, or are not ours.
    """
    try:
        await _require_whole(run)
    except (PublicationLost, SlotLost, LogGap) as error:
        return type(error)(f"{error.message}; {await tables_to_copy(run.target)}", hint=error.hint)
    return None


async def _require_whole(run: Run) -> None:
    settings, migration = run.settings, run.migration
    with asking("target", "reading checkpoints"):
        checkpoints = await run.target.fetch(
            "select lane, next_offset, commit_lsn, ordinal from _live_migration.checkpoints order by lane"
        )
    # A producer may be at work: it writes the control topic first, then moves the slot. So the slot is read first.
    async with run.source_session("slot check") as source:
        with asking("source", "looking at the slot"):
            await require_primary(settings, source)
            slot = await read_slot(source, settings.slot)
        await require_publications(run, source, run.target)
    if loss := slot_loss(settings.slot, slot):
        raise SlotLost(loss)
    await check_topics(settings, migration.lane_count)
    config, position = await _read_words(run, slot)
    if config is not None and config.topic_id != str(migration.topic_id):
        if not await _is_log_ours(run):
            raise LogGap(
                f"topic {settings.control_topic} was made again: it belongs to another change log than the target's state"
            )
        # A late word of a coordinator that slept through a recopy, on the log of before. Any producer that starts would believe it.
        await run.publications_changed(run.target)
    if slot and slot.confirmed_lsn is not None and (end := _log_end(run, position)) < slot.confirmed_lsn:
        raise SlotLost(
            f"replication slot {settings.slot} is ahead of the log: confirmed up to {Lsn(slot.confirmed_lsn)}, the log ends at "
            f"{Lsn(end)}; somebody else has read from it or made it anew, or the broker has lost the log's tail"
        )
    await _check_branch(run, position)
    await _check_wal_end(run, position)
    lanes = [(row["next_offset"], Position(int(row["commit_lsn"]), row["ordinal"])) for row in checkpoints]
    await _check_log(run, position, lanes)


async def _read_words(run: Run, slot: SlotState | None) -> tuple[ProducerConfig | None, LogPosition | None]:
    """Give the coordinator's newest word and the producer's, read again for a moment while the slot, read before, is ahead of the latter.

    A producer moves the slot once Kafka has taken its transaction, whose end need not have come to the control topic by then.
    """
    deadline = time.monotonic() + _MARKERS_SECONDS
    async with ControlReader(run.settings) as reader:
        while True:
            control = await reader.read()
            config = ProducerConfig.model_validate_json(control[CONFIG]) if CONFIG in control else None
            position = LogPosition.model_validate_json(control[POSITION]) if POSITION in control else None
            confirmed = slot.confirmed_lsn if slot else None
            if confirmed is None or confirmed <= _log_end(run, position) or time.monotonic() > deadline:
                return config, position
            await asyncio.sleep(0.5)


def _log_end(run: Run, position: LogPosition | None) -> int:
    """Give up to where the change log is whole; what no producer has begun yet has no end."""
    if position is not None:
        return position.confirm_lsn
    return run.migration.start_lsn if run.migration.start_lsn is not None else sys.maxsize


async def _is_log_ours(run: Run) -> bool:
    tails = await read_tails(run.settings, run.migration.lane_count)
    return any(tail.last is not None and tail.last.topic_id == run.migration.topic_id.bytes for tail in tails)


async def _check_branch(run: Run, position: LogPosition | None) -> None:
    """Raise SlotLost when the source failed over and lacks what was published, or does not come from where we were."""
    if run.migration.start_lsn is None or run.migration.binary_stream is None:
        return
    source = await read_timeline(run.settings.source_uri())
    config = producer_config(run.settings, run.migration)
    recorded = position.timeline if position else config.timeline
    for timeline in {recorded, config.timeline} - {source.timeline}:
        check_timeline(
            source.left, source.timeline, timeline, published_lsn(config, position) if timeline == recorded else 0
        )


async def _check_wal_end(run: Run, position: LogPosition | None) -> None:
    """Raise SlotLost when the source's WAL ends before what was published or copied of it on this timeline."""
    if run.migration.start_lsn is None or run.migration.binary_stream is None:
        return
    with asking("target", "reading how far tables were copied"):
        copied = await run.target.fetchval(_COPIED, run.migration.source_timeline)
    published = published_lsn(producer_config(run.settings, run.migration), position)
    async with run.source_session("WAL check") as source:  # after the position was read, which moves on
        with asking("source", "asking where the WAL ends"):
            timeline, wal_end = await source.fetchrow(_WAL_END)
    if wal_end is not None:
        is_same = timeline == run.migration.source_timeline
        check_wal_end(wal_end, max(published, int(copied)) if copied is not None and is_same else published)


async def _check_log(run: Run, position: LogPosition | None, checkpoints: list[tuple[int, Position]]) -> None:
    """Compare the log's ends with position record and checkpoints; a running producer's may be behind the record for a moment,
    for a transaction's end is not seen in all partitions at once."""
    deadline = time.monotonic() + _MARKERS_SECONDS
    topic = run.settings.changes_topic
    while True:
        tails = await read_tails(run.settings, run.migration.lane_count)
        try:
            check_tails(topic, tails, run.migration.topic_id, position, may_be_ahead=True)
            for tail, (next_offset, applied) in zip(tails, checkpoints, strict=False):  # there are none before the plan
                check_lane(topic, tail, next_offset, applied, position)
            return
        except LogGap:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.5)


def check_lane(topic: str, tail: LaneTail, next_offset: int, applied: Position, position: LogPosition | None) -> None:
    """Compare a lane's checkpoint with its partition. Raises LogGap when what comes next can never be had."""
    where = f"{topic}-{tail.lane}"
    published = Position(*position.lanes[tail.lane]) if position else START
    if next_offset > tail.end_offset:
        raise LogGap(
            f"{where} ends at offset {tail.end_offset}, but the target has applied it up to offset {next_offset}: the topic was "
            "made again, or the broker has lost the log's tail"
        )
    if applied < max(published, tail.position) and not tail.first_offset <= next_offset < tail.end_offset:
        raise LogGap(
            f"{where} holds offsets {tail.first_offset} to {tail.end_offset}, but the target needs what follows {applied} "
            f"at offset {next_offset}: segments were deleted before they were applied"
        )


async def tables_to_copy(target: asyncpg.Connection) -> str:
    """Name the migration's tables, for a message that says that they must be copied again."""
    with asking("target", "reading the plan"):
        rows = await target.fetch(
            """select schema_name || '.' || table_name as name from _live_migration.tables
               order by size_bytes desc, 1"""
        )
    if not rows:
        return "no table was copied yet"
    return f"to be copied again: {len(rows)} tables, {name_list(row['name'] for row in rows)}"
