"""Barriers: a message in the source's WAL that comes out of every lane, and the proof that nothing came between two."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import uuid4

import asyncpg
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from live_migration.common import pgoutput
from live_migration.common.control import MESSAGE_PREFIX, WalMessage
from live_migration.common.errors import KafkaAway, LaneStopped
from live_migration.common.kafka import translate
from live_migration.common.kafka_clients import log_consumer
from live_migration.common.lsn import Lsn
from live_migration.common.postgres import asking
from live_migration.common.segment import FRAGMENT, HEADER, decode_header, iterate_frames
from live_migration.common.settings import Settings
from live_migration.coordinator.run import Run

_REPORT_SECONDS = 5.0
_ERROR_PATIENCE_SECONDS = 15.0
_CHANGES = frozenset({pgoutput.INSERT, pgoutput.UPDATE, pgoutput.DELETE})


@dataclass(frozen=True, slots=True)
class Barrier:
    """A barrier's id, and the WAL positions before it was written and after it was committed: others' commits may lie between them, too."""

    id: str
    before_lsn: int
    after_lsn: int


@dataclass(frozen=True, slots=True)
class LanePosition:
    """A lane's checkpoint when it had passed a barrier."""

    lane: int
    next_offset: int
    commit_lsn: int


@dataclass(frozen=True, slots=True)
class Between:
    """The relations that were changed before a barrier, and the barrier's own commit LSN: in a lane that nothing has touched since, the last.

    `commit_lsn`: 0 where changes were found first.
    """

    changed: list[str]
    commit_lsn: int


async def emit_barrier(source: asyncpg.Connection, migration_id: str) -> Barrier:
    """Write a barrier into the source's WAL; it is flushed there when this returns."""
    return await _emit(source, "barrier", migration_id)


async def emit_call(source: asyncpg.Connection, migration_id: str) -> None:
    """Write what makes every lane that has come so far look for chunks which it has to copy."""
    await _emit(source, "call", migration_id)


async def emit_heartbeat(source: asyncpg.Connection, migration_id: str) -> int:
    """Write what comes out of no lane, and give a position: a change log that is confirmed past it holds all before it."""
    return (await _emit(source, "heartbeat", migration_id)).before_lsn


async def _emit(source: asyncpg.Connection, kind: str, migration_id: str) -> Barrier:
    barrier = uuid4().hex
    content = WalMessage(kind=kind, migration_id=migration_id, id=barrier).model_dump_json()
    with asking("source", f"writing a {kind} into the WAL"):
        before = await source.fetchval("select pg_current_wal_insert_lsn()")
        async with source.transaction():
            await source.execute("set local synchronous_commit = local")
            await source.execute("select pg_logical_emit_message(true, $1, $2::text)", MESSAGE_PREFIX, content)
        after = await source.fetchval("select pg_current_wal_insert_lsn()")
    return Barrier(barrier, int(before), int(after))


async def await_barrier(run: Run, barrier: Barrier, *, what: str) -> list[LanePosition]:
    """Wait until every lane has passed the barrier; say every few seconds which have not.

    Raises:
        LaneStopped: a lane has had the same error for a while.
    """
    reported = time.monotonic()
    failing_since: dict[int, float] = {}
    while True:
        with asking("target", "reading checkpoints"):
            rows = await run.target.fetch(
                """select lane, next_offset, commit_lsn, barrier, error, hint from _live_migration.checkpoints order by lane"""
            )
        waiting = [row for row in rows if row["barrier"] != barrier.id]
        if not waiting:
            return [LanePosition(row["lane"], row["next_offset"], int(row["commit_lsn"])) for row in rows]
        now = time.monotonic()
        _judge_errors(run, waiting, failing_since, now)
        if now - reported >= _REPORT_SECONDS:
            reported = now
            lanes = ", ".join(f"{row['lane']} (at {Lsn(row['commit_lsn'])})" for row in waiting[:8])
            run.reporter.note(f"{what}: waiting for {len(waiting)} of {len(rows)} lanes to reach it: {lanes}")
        await asyncio.sleep(0.05)


def _judge_errors(run: Run, waiting: Sequence[asyncpg.Record], failing_since: dict[int, float], now: float) -> None:
    for row in waiting:
        lane, error = row["lane"], row["error"]
        run.reporter.warn_on_change(f"lane {lane}", f"lane {lane} has stopped: {error}" if error else "")
        if not error:
            failing_since.pop(lane, None)
        elif now - failing_since.setdefault(lane, now) > _ERROR_PATIENCE_SECONDS:
            raise LaneStopped(f"lane {lane} has stopped: {error}", hint=row["hint"] or "")


async def changes_between(
    settings: Settings, since: Mapping[int, int], barrier: Barrier, *, silence: float = 60.0
) -> Between:
    """Read each lane from an offset up to the barrier; give the relations that were changed there, and where the barrier is.

    `since`: next offset of each lane, read before the barrier was written. A change too big for one record shows as
    `a large row`. Reading ends at the first changes found in a lane.

    Raises:
        KafkaAway: the broker is lost, or has given nothing for `silence` seconds. The barrier is in the log: the lanes have passed it.
        KafkaError: it refuses, as where the log is not there any more.
    """
    consumer = log_consumer(settings, max_partition_fetch_bytes=4 << 20)
    found: set[str] = set()
    commit_lsn = 0
    unfinished = {TopicPartition(settings.changes_topic, lane): offset for lane, offset in since.items()}
    deadline = time.monotonic() + silence
    try:
        await consumer.start()
        consumer.assign(list(unfinished))
        for partition, offset in unfinished.items():
            consumer.seek(partition, offset)
        while unfinished:
            if time.monotonic() > deadline:
                lanes = sorted(partition.partition for partition in unfinished)
                raise KafkaAway(f"Kafka: nothing has come of lanes {lanes} for {silence:g} s, and the barrier is there")
            found_records = await consumer.getmany(timeout_ms=500)
            if found_records:
                deadline = time.monotonic() + silence
            for partition, records in found_records.items():
                for record in records:
                    changed, found_lsn = _read_record(record.value, barrier)
                    found |= changed
                    commit_lsn = found_lsn or commit_lsn
                    if (found_lsn or changed) and partition in unfinished:
                        del unfinished[partition]
                        consumer.pause(partition)
    except kafka_errors.KafkaError as error:
        raise translate(error, f"reading {settings.changes_topic}") from error
    finally:
        await consumer.stop()
    return Between(sorted(found), commit_lsn)


def _read_record(record: bytes, barrier: Barrier) -> tuple[set[str], int]:
    """Give the relations changed before the barrier in a record, and the barrier's commit LSN, 0 where it is not in it."""
    if decode_header(record).kind == FRAGMENT:
        return {"a large row"}, 0
    names: dict[int, str] = {}
    changed: set[str] = set()
    commit_lsn = 0
    for frame in iterate_frames(record[HEADER.size :]):
        if frame.kind == pgoutput.BEGIN:
            commit_lsn = pgoutput.decode_begin(frame.message).commit_lsn
        elif frame.kind == pgoutput.RELATION:
            relation = pgoutput.decode_relation(frame.message)
            names[relation.oid] = str(relation.name)
        elif frame.kind in _CHANGES:
            oid = pgoutput.relation_oid(frame.message)
            changed.add(names.get(oid, f"relation {oid}"))
        elif frame.kind == pgoutput.TRUNCATE:
            changed |= {
                names.get(oid, f"relation {oid}") for oid in pgoutput.decode_truncate(frame.message).relation_oids
            }
        elif frame.kind == pgoutput.MESSAGE and _is_barrier(frame.message, barrier):
            return changed, commit_lsn
    return changed, 0


def _is_barrier(message: bytes, barrier: Barrier) -> bool:
    decoded = pgoutput.decode_logical_message(message)
    return decoded.prefix == MESSAGE_PREFIX and WalMessage.model_validate_json(decoded.content).id == barrier.id
