"""Applied segments are deleted from the change topic behind each lane's checkpoint: the broker's disk stays bounded.

A consumer commits with `synchronous_commit = off`, so a crash of the target may take its newest checkpoints back. Nothing is
deleted but below a checkpoint that is flushed there, and a margin stays even then: for people who look at the log, and for the day
on which the target's disk has told an untruth. A target restored from a backup, or a standby that lagged, needs `--keep-changes`.

A coordinator looks whether it still has its role after the checkpoints are known to be flushed. If it loses the role right then, what it
goes on to delete is as dispensable as it was: a flushed checkpoint never moves back.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import asyncpg
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.admin import RecordsToDelete

from live_migration.common import kafka
from live_migration.common.errors import ConnectionLost, Fenced
from live_migration.common.postgres import asking
from live_migration.common.settings import MIB
from live_migration.common.telemetry import get_logger
from live_migration.coordinator.run import Run

INTERVAL_SECONDS = 10.0
MARGIN_BYTES = 64 * MIB
"""Applied bytes that stay in each lane: about a file of Kafka's, which are deleted whole only."""
STEP_BYTES = 16 * MIB
"""Applied bytes of a lane between two deletions."""
_FLUSH_SECONDS = 5.0
_KAFKA_SECONDS = 30.0

_ROLE = "select phase = 'replay' from _live_migration.migration where epoch = $1 and topic_id = $2"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Mark:
    """A lane's checkpoint, flushed on the target: where it goes on, and the bytes of segments applied before."""

    next_offset: int
    byte_count: int


class TrimPlan:
    """Pure: which offset each lane may be deleted up to, from its checkpoints as they come."""

    def __init__(self, margin_bytes: int, step_bytes: int) -> None:
        self._margin_bytes = margin_bytes
        self._step_bytes = step_bytes
        self._marks: dict[int, deque[Mark]] = {}
        self._trimmed: dict[int, int] = {}

    def add(self, lane: int, mark: Mark) -> None:
        """Take in a lane's flushed checkpoint."""
        marks = self._marks.setdefault(lane, deque())
        while marks and marks[-1].next_offset > mark.next_offset:
            marks.pop()  # nothing of ours moves a flushed checkpoint back; whoever did needs the log
        if not marks or mark.byte_count - marks[-1].byte_count >= self._step_bytes:
            marks.append(mark)
        while len(marks) > 1 and mark.byte_count - marks[1].byte_count >= self._margin_bytes:
            marks.popleft()

    def due(self, lane: int, byte_count: int) -> int | None:
        """Give the offset below which a lane that has applied `byte_count` may be deleted; None: it is not worth it."""
        marks = self._marks.get(lane)
        if not marks or byte_count - marks[0].byte_count < self._margin_bytes:
            return None
        offset = marks[0].next_offset
        return offset if offset > self._trimmed.get(lane, 0) else None

    def done(self, lane: int, offset: int) -> None:
        """Take note that a lane is deleted up to an offset."""
        self._trimmed[lane] = offset


async def watch_trimming(run: Run) -> None:
    """Delete what is applied while the migration is in phase `replay`; returns only with `--keep-changes`.

    A broker that refuses is named, once, and asked again; one that is away is just asked again.
    """
    async with run.target_session("trimming") as target:
        if await _keeps_changes(run, target):
            return
        plan = TrimPlan(MARGIN_BYTES, STEP_BYTES)
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            looked_at = time.monotonic()
            with asking("target", "reading flushed checkpoints"):
                marks = await read_flushed(run, target)
            for lane, mark in marks.items():
                plan.add(lane, mark)
            due = {lane: offset for lane, mark in marks.items() if (offset := plan.due(lane, mark.byte_count))}
            if due and await _delete(run, due, looked_at + run.settings.lease):
                for lane, offset in due.items():
                    plan.done(lane, offset)


async def _keeps_changes(run: Run, target: asyncpg.Connection) -> bool:
    """Tell what was said last: now, or when the migration began or was resumed."""
    said = "keep_changes" in run.settings.model_fields_set
    keeps = run.settings.keep_changes if said else bool(run.migration.settings.get("keep_changes"))
    with asking("target", "recording whether changes are kept"):
        await target.execute(
            """update _live_migration.migration set settings = settings || jsonb_build_object('keep_changes', $1::bool)
               where epoch = $2""",
            keeps,
            run.epoch,
        )
    return keeps


async def read_flushed(run: Run, target: asyncpg.Connection) -> dict[int, Mark]:
    """Give each lane's checkpoint once it is flushed on the target; nothing outside phase `replay`.

    All in one transaction, and so in one server process: a crash between reading and flushing would have ended it. Otherwise
    a target that crashed, lost the checkpoints and wrote other WAL up to the same position would look as if it had kept them.

    Raises:
        Fenced: another coordinator runs this migration, or it is another migration.
    """
    async with target.transaction(isolation="read_committed"):
        rows = await target.fetch("select lane, next_offset, byte_count from _live_migration.checkpoints")
        # In a statement of its own: what that snapshot saw as committed is in the WAL below this. An idle target flushes it
        # with the next commit that is waited for, and the coordinator's lease brings one each second.
        written = await target.fetchval("select pg_current_wal_insert_lsn()::text")
        deadline = time.monotonic() + _FLUSH_SECONDS
        while not await target.fetchval("select pg_current_wal_flush_lsn() >= $1::text::pg_lsn", written):
            if time.monotonic() > deadline:
                return {}
            await asyncio.sleep(0.05)
        is_replay = await target.fetchval(_ROLE, run.epoch, run.migration.topic_id)
    if is_replay is None:
        raise Fenced("another coordinator runs this migration now")
    return {row["lane"]: Mark(row["next_offset"], row["byte_count"]) for row in rows} if is_replay else {}


async def _delete(run: Run, offsets: Mapping[int, int], deadline: float) -> bool:
    """Delete each lane's records below an offset; False when that did not come to pass.

    Not after `deadline`: who was stopped for so long may find another migration's topic under this name.
    """
    topic = run.settings.changes_topic
    records = {TopicPartition(topic, lane): RecordsToDelete(offset) for lane, offset in offsets.items()}
    try:
        async with asyncio.timeout(_KAFKA_SECONDS), kafka.admin(run.settings) as client:
            if time.monotonic() > deadline:
                return False
            await client.delete_records(records)
    except (kafka_errors.KafkaError, ConnectionLost, TimeoutError) as error:
        lost = kafka.translate(error, "deleting records") if isinstance(error, kafka_errors.KafkaError) else error
        if isinstance(lost, ConnectionLost | TimeoutError):
            log.info("applied segments not deleted, trying again", reason=str(lost) or "Kafka does not answer")
        else:
            run.reporter.warn_on_change(
                "trimming",
                f"applied segments of topic {topic} cannot be deleted and stay on the broker's disk: {type(error).__name__}: "
                f"{error}; give our user the right to delete records there, or go on with --keep-changes",
            )
        return False
    run.reporter.warn_on_change("trimming", "")
    log.info("applied segments deleted", topic=topic, below=dict(sorted(offsets.items())))
    return True
