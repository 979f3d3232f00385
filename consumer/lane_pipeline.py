"""A lane at work: records are fetched, decoded and applied at the same time, one batch being applied while the next grows.

An error travels down the pipeline behind what was read before it, so that the lane applies all it can first.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import asyncpg

from live_migration.common.errors import ConnectionLost, LaneStopped, LiveMigrationError, Retry
from live_migration.common.postgres import asking
from live_migration.common.segment import START, Position
from live_migration.common.settings import Settings
from live_migration.common.tasks import TaskGroup
from live_migration.consumer.applier import Applier
from live_migration.consumer.checkpoint import Advance, Checkpoint, advance
from live_migration.consumer.chunk_marks import note_suspects
from live_migration.consumer.chunk_rebuild import due_chunks
from live_migration.consumer.decoder import Batch, LaneDecoder
from live_migration.consumer.lane_meeting import LanesMeet, meet
from live_migration.consumer.log_reader import LogReader, Segment
from live_migration.consumer.memory_budget import MemoryBudget
from live_migration.consumer.net_changes import folded_runs, work_ahead
from live_migration.consumer.refusal import Place
from live_migration.consumer.refusal_search import apply_carefully
from live_migration.consumer.segment_walk import place_relation
from live_migration.consumer.skips import LaneSkips, SkippedChange
from live_migration.consumer.target_tables import ChunkChangedUnseen, RebuildFirst, RelationRefused

READ_AHEAD_BYTES = 2 * 1024 * 1024
"""How much is read and not yet decoded: a lane whose target is slow must not use up the budget of all."""
MOST_RUNS = 400
"""Runs in one target transaction: tables and their staging tables take some ten locks a run from the server's few thousand."""

_MEETING_SECONDS = 2.0
"""How long other lanes of a table are waited for with memory held that is wanted: beginning again takes about as long on a busy machine."""


class ChunksDue(LiveMigrationError):
    """The lane has to copy chunks before it goes on."""

    retry = Retry.RECONNECT


@dataclass(slots=True)
class Flush:
    """Segments decoded into one batch, to be applied in one go."""

    batch: Batch = field(default_factory=Batch)
    segment_count: int = 0
    held_bytes: int = 0
    next_offset: int = 0
    position: Position = START
    may_commit: bool = True
    skipped: list[SkippedChange] = field(default_factory=list)


class LanePipeline:
    """Applies one lane from a checkpoint on, until it is cancelled or something stops it."""

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        connection: asyncpg.Connection,
        reader: LogReader,
        decoder: LaneDecoder,
        budget: MemoryBudget,
        lane_count: int,
        on_progress: Callable[[Checkpoint], None],
        skips: LaneSkips,
        careful_until: Position = START,
        *,
        has_marks: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings = settings
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._connection = connection
        self._reader = reader
        self._decoder = decoder
        self._budget = budget
        self._lane_count = lane_count
        self._skips = skips
        self._careful_until = careful_until
        self._has_marks = has_marks  # chunks wait for the lane to get so far
        self.attempted = START
        """Last position of the newest segment that was begun to be decoded."""
        self._inbox: deque[Segment] = deque()
        self._inbox_bytes = 0
        self._growing = Flush()
        self._ready: Flush | None = None
        self._must_end_at_commit = False
        self._open_changes = self._open_bytes = 0  # of flushes handed over, that may not be committed yet
        self._reading_error: LiveMigrationError | None = None
        self._decoding_error: LiveMigrationError | None = None
        self._stopped_by: ChunkChangedUnseen | None = None
        self._is_applying = False
        self._held_bytes = 0
        self._changed = asyncio.Condition()

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            LiveMigrationError: what stops the lane, after everything before it has been applied.
        """
        failure: LiveMigrationError | None = None
        try:
            async with TaskGroup() as group:
                helpers = [group.create_task(each) for each in (self._read(), self._decode(), self._watch_session())]
                try:
                    await self._apply()
                except LiveMigrationError as error:
                    # not out of the group: one that ends by an error loses a cancellation that comes at the same time
                    failure = error
                for helper in helpers:
                    helper.cancel()
        finally:
            self._budget.release(self._held_bytes)
            self._held_bytes = 0
        if failure is not None:
            raise failure

    async def _watch_session(self) -> None:
        """End the pipeline with the session, also while nothing comes that would be written over it.

        A target that crashed has undone commits of ours which it had not flushed: they must not wait for the lane's next change.
        """
        ended = asyncio.Event()
        self._connection.add_termination_listener(lambda _: ended.set())
        if not self._connection.is_closed():
            await ended.wait()
        async with self._changed:
            lane = self._checkpoint.lane
            self._decoding_error = ConnectionLost(f"target: lane {lane}: its session has ended")
            self._changed.notify_all()

    # reading

    async def _read(self) -> None:
        try:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._inbox_bytes < READ_AHEAD_BYTES)
                for record in await self._reader.fetch():
                    segment = await self._reader.take(record)
                    if segment is not None:
                        await self._put(segment)
        except LiveMigrationError as error:
            async with self._changed:
                self._reading_error = error
                self._changed.notify_all()

    async def _put(self, segment: Segment) -> None:
        self._held_bytes += segment.held_bytes  # before the wait below, so that a cancelled one gives them back
        async with self._changed:
            self._inbox.append(segment)
            self._inbox_bytes += segment.held_bytes
            self._changed.notify_all()

    # decoding

    async def _decode(self) -> None:
        try:
            while await self._grow():
                self._work_ahead(self._growing)
                await self._hand_over()
        except LiveMigrationError as error:
            async with self._changed:
                self._decoding_error = error
                self._changed.notify_all()

    async def _grow(self) -> bool:
        """Decode into the growing batch until it is to be applied; False when reading has ended and nothing is left."""
        if self._stopped_by is not None:
            raise self._stopped_by
        flush = self._growing = Flush()
        while not self._is_full(flush):
            async with self._changed:
                await self._changed.wait_for(lambda: self._inbox or self._is_due(flush))
                if not self._inbox:
                    if self._reading_error and not flush.segment_count:
                        raise self._reading_error
                    break
                segment = self._inbox.popleft()
                self.attempted = segment.last
                self._inbox_bytes -= segment.held_bytes
                self._changed.notify_all()
            await asyncio.sleep(0)  # nothing else here need wait: let the other lanes have their turn
            change_count = flush.batch.change_count
            try:
                await self._decode_segment(segment, flush)
            except LanesMeet as error:
                self._put_back(segment)
                if flush.segment_count:
                    break  # all before it is applied first
                await self._meet(error)
                flush.batch = Batch()
                continue
            except ChunkChangedUnseen as error:
                if not flush.segment_count or flush.batch.change_count > change_count:
                    raise  # half a segment must not be applied: its position is that of its end
                self._stopped_by = error  # it begins its segment: all before it is applied first, a TRUNCATE above all
                break
            flush.segment_count += 1
            flush.held_bytes += segment.held_bytes
            flush.next_offset, flush.position = segment.next_offset, segment.last
        flush.may_commit = self._may_commit(flush.batch)
        return True

    def _put_back(self, segment: Segment) -> None:
        self._inbox.appendleft(segment)
        self._inbox_bytes += segment.held_bytes

    async def _meet(self, error: LanesMeet) -> None:
        """Wait for other lanes, in the session that applies, with what is read kept.

        Raises:
            LanesMeet: what is kept is wanted, by one of them perhaps.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._ready is None and not self._is_applying)
        if self._open_bytes:  # a transaction on the target is open, which the others may wait for
            raise error
        end = time.monotonic() + _MEETING_SECONDS
        with asking("target", error.message):
            has_met = await meet(
                self._connection,
                self._checkpoint,
                error.meeting,
                lambda: self._budget.is_wanted and time.monotonic() >= end,
            )
        if not has_met:
            raise error
        self._decoder.note_met(error.meeting.commit_lsn)

    async def _decode_segment(self, segment: Segment, flush: Flush) -> None:
        skipped: list[SkippedChange] = []
        body = self._skips.take_out(segment, skipped) if self._skips else segment.body
        try:
            with asking("target", "looking at the tables"):
                await self._decoder.decode(body, flush.batch)
        except (ChunkChangedUnseen, RebuildFirst):
            raise
        except RelationRefused as refusal:
            if segment.last > self._careful_until:
                raise
            placed = place_relation(refusal, body, self._place(segment.next_offset))
            raise placed or LaneStopped(refusal.message, hint=refusal.hint) from refusal
        flush.skipped += skipped

    def _place(self, next_offset: int) -> Place:
        settings = self._settings
        return Place(settings.changes_topic, self._checkpoint.lane, next_offset - 1, settings.dead_letter_topic)

    def _is_full(self, flush: Flush) -> bool:
        batch, settings = flush.batch, self._settings
        if flush.segment_count and flush.position <= self._careful_until:
            return True
        if (
            batch.change_count >= settings.batch_rows
            or batch.byte_count >= settings.batch_bytes
            or batch.run_count >= MOST_RUNS
        ):
            return True
        if batch.is_inside_transaction or not flush.segment_count or not self._open_bytes:
            return False
        # a Commit at last, for a target transaction that has been open for long enough
        return (
            batch.change_count + self._open_changes >= settings.batch_rows
            or batch.byte_count + self._open_bytes >= settings.batch_bytes
        )

    def _is_due(self, flush: Flush) -> bool:
        """Tell whether a batch is applied as it is: nothing more is there, and the target waits for us."""
        if self._reading_error:
            return True
        return bool(flush.segment_count) and not self._is_applying and self._ready is None

    def _may_commit(self, batch: Batch) -> bool:
        """With one lane, the target shows whole source transactions; with several, any point will do.

        Deferrable constraints of the source hold at its commits only, so that a lane goes on to the next one.
        """
        self._must_end_at_commit |= batch.must_end_at_commit
        may = not batch.is_inside_transaction or not (self._lane_count == 1 or self._must_end_at_commit)
        if may:
            self._must_end_at_commit = False
            self._open_changes = self._open_bytes = 0
        else:
            self._open_changes += batch.change_count
            self._open_bytes += batch.byte_count
        return may

    def _work_ahead(self, flush: Flush) -> None:
        """While the target is at work, do what the next batch takes of us, where there is room for what comes of it."""
        runs = folded_runs(flush.batch) if self._is_applying else []
        if runs and self._budget.take_to_spare(flush.held_bytes):
            self._held_bytes += flush.held_bytes
            flush.held_bytes *= 2
            work_ahead(runs)

    async def _hand_over(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._ready is None)
            self._ready = self._growing
            self._changed.notify_all()

    # applying

    async def _apply(self) -> None:
        applier = Applier(self._connection, self._checkpoint.lane)
        while True:
            flush = await self._next_flush()
            await self._apply_transaction(applier, flush)

    async def _next_flush(self) -> Flush:
        """Give the next flush; raise what ended the decoding when there is none."""
        async with self._changed:
            self._is_applying = False
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._ready or self._decoding_error)
            if self._ready is None:
                assert self._decoding_error is not None
                raise self._decoding_error
            flush, self._ready = self._ready, None
            self._is_applying = True
            self._changed.notify_all()
        return flush

    async def _apply_transaction(self, applier: Applier, flush: Flush) -> None:
        """Apply flushes up to one that may end a target transaction, with the checkpoint in it."""
        with asking("target", f"applying lane {self._checkpoint.lane}"):
            await applier.begin()
            change_count = byte_count = 0
            barrier, commit_time, is_called = None, None, False
            skipped: list[Position] = []
            while True:
                batch = flush.batch
                await self._apply_batch(applier, flush)
                if batch.suspects:
                    await note_suspects(self._connection, batch.suspects)
                skipped += await self._skips.send_letters(flush.skipped)
                change_count += batch.change_count
                byte_count += batch.byte_count
                barrier = batch.barrier or barrier
                is_called |= batch.is_called
                commit_time = commit_time if batch.commit_time is None else batch.commit_time
                self._release(flush)
                if flush.may_commit:
                    break
                try:
                    flush = await self._next_flush()
                except ChunkChangedUnseen as error:
                    error.is_undone = True  # and with it the target transaction that is open
                    raise
            to = Advance(flush.next_offset, flush.position, barrier, change_count, byte_count, commit_time)
            await self._skips.finish(self._connection, skipped)
            reached = await advance(self._connection, self._checkpoint, to)
            await self._connection.execute("commit")
        self._checkpoint = reached
        self._on_progress(reached)
        if is_called or self._has_marks():
            with asking("target", f"looking for chunks of lane {reached.lane}"):
                if await due_chunks(self._connection, reached.lane, reached.position.commit_lsn):
                    raise ChunksDue(f"lane {reached.lane} has chunks to copy")

    async def _apply_batch(self, applier: Applier, flush: Flush) -> None:
        if flush.position > self._careful_until:
            await applier.apply(flush.batch)
        else:
            await apply_carefully(self._connection, applier, flush.batch, self._place(flush.next_offset))

    def _release(self, flush: Flush) -> None:
        self._budget.release(flush.held_bytes)
        self._held_bytes -= flush.held_bytes
