"""One lane in this process: takes its checkpoint, runs the pipeline, and after any error begins again from the checkpoint."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress

import asyncpg

from live_migration.common.errors import ConnectionLost, Fenced, LaneStopped, LiveMigrationError, Retry, TargetError
from live_migration.common.home import Home
from live_migration.common.meeting import Meeting
from live_migration.common.postgres import asking, connect, end_with, session
from live_migration.common.relation import QualifiedName
from live_migration.common.segment import START, Position
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, record_event
from live_migration.common.tasks import is_cancelled
from live_migration.common.telemetry import get_logger
from live_migration.consumer import checkpoint as checkpoints
from live_migration.consumer.applier import Applier
from live_migration.consumer.checkpoint import Checkpoint
from live_migration.consumer.chunk_marks import mark_chunk, read_lane_suspects
from live_migration.consumer.chunk_rebuild import ChunkToRebuild, due_chunks, find_chunk, rebuild_chunk
from live_migration.consumer.copy_errors import TableStopped
from live_migration.consumer.decoder import Decoded, LaneDecoder
from live_migration.consumer.lane_meeting import LanesMeet, has_met, meet
from live_migration.consumer.lane_pipeline import ChunksDue, LanePipeline
from live_migration.consumer.log_reader import LogReader
from live_migration.consumer.memory_budget import MemoryBudget
from live_migration.consumer.passed_over import pass_over
from live_migration.consumer.refusal import ChangeRefused, is_of_a_change
from live_migration.consumer.right_source import source_session
from live_migration.consumer.skips import LaneSkips
from live_migration.consumer.source_watch import giving_way, write_flush_barrier
from live_migration.consumer.strangers import find_unseen, let_go_if_gone, meet_chunk
from live_migration.consumer.target_tables import ChunkChangedUnseen, NotPlanned, RebuildFirst, TargetTables

STANDBY_SECONDS = 1.0
STOPPED_SECONDS = 5.0
"""How long a lane waits after the target refused a change."""
BROKEN_LOG_SECONDS = 30.0
"""How long after the log turned out to be wrong, which seldom mends itself."""
_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.2, 10.0

log = get_logger(__name__)


def _seconds_after(error: LiveMigrationError) -> float:
    """Give how long a lane waits after an error that stops it; TableStopped is of a copy of its own."""
    if isinstance(error, TableStopped):
        return error.retry_seconds
    return STOPPED_SECONDS if isinstance(error, TargetError) else BROKEN_LOG_SECONDS


class PartitionTask:
    """Applies one lane for as long as this process is assigned its partition; `run` ends by cancellation only."""

    def __init__(
        self,
        settings: Settings,
        worker: str,
        migration: Migration,
        lane: int,
        budget: MemoryBudget,
        on_progress: Callable[[int, int], None] = lambda lane, next_offset: None,
    ) -> None:
        self._settings = settings
        self._worker = worker
        self._migration = migration
        self._lane = lane
        self._budget = budget
        self._on_progress = on_progress
        self._checkpoint: Checkpoint | None = None
        # After a refusal each segment is applied by itself up to here, and the refused change is looked for: all segments
        # before its own get through, as they must before the target is altered (a segment holds but one shape of a table).
        self._careful_until = START
        self._refused_at: Position | None = None  # where chunks that wait were copied early
        self._unseen_at: tuple[int, int] | None = None  # relation and transaction that made a chunk be copied
        self._decoded = Decoded(0, 0)
        self._suspects: dict[int, Home] = {}  # met in what was decoded, applied or not
        self._meeting: Meeting | None = None  # the newest, of which the decoder hears once it is over
        self._has_marks = False
        self._must_take = True  # the group gave us the partition: whoever still holds the lane has to go
        self._skips = LaneSkips(settings, migration, lane)
        self._backoff = _FIRST_BACKOFF_SECONDS
        self._log = log.bind(lane=lane)

    async def run(self) -> None:
        """Work until cancelled; whatever stops the lane is shown in its checkpoint, and tried again."""
        while True:
            try:
                await self._run_once()
            except asyncio.CancelledError:
                if is_cancelled():
                    raise
                self._log.warning("lane begins again", reason="a task of its own was cancelled, and not by us")
                await asyncio.sleep(STANDBY_SECONDS)
            except Fenced as error:
                self._log.info("lane left", reason=error.message)
                await asyncio.sleep(STANDBY_SECONDS)
            except ChunksDue as error:
                self._log.info("lane begins again", reason=error.message)
            except LanesMeet as error:
                await self._meet(error)
            except ChunkChangedUnseen as error:
                await self._mark(error)
            except RebuildFirst as error:
                await self._await_rebuild(error)
            except NotPlanned as error:
                if not await self._let_go(error):
                    await self._pause(error)
            except LiveMigrationError as error:
                if isinstance(error, ChangeRefused) and (
                    await self._has_chunks_to_copy(error) or await self._passes_over(error)
                ):
                    continue
                if is_of_a_change(error):
                    self._log.info("lane looks for the refused change", reason=error.message)
                else:
                    await self._pause(error)

    def assigned_again(self) -> None:
        """Take the lane from whoever holds it, should it not be ours any more: he may be one that hangs."""
        self._must_take = True

    async def _run_once(self) -> None:
        """Take the lane and apply it until something happens.

        Raises:
            Fenced: another consumer holds it. It may be the group's choice, or we may be; whose session ends first tells.
        """
        async with AsyncExitStack() as stack:
            connection = await self._connect(stack, f"live-migration lane {self._lane}", sends_bulk=True)
            with asking("target", f"taking lane {self._lane}"):
                if not self._must_take and await checkpoints.is_taken_over(connection, self._lane, self._worker):
                    raise Fenced(f"lane {self._lane} was taken over by another consumer")
                self._checkpoint = None
                held = await self._acquire(connection)
                await self._skips.load(connection, held.position)
            self._checkpoint = held
            self._must_take = False
            await self._rebuild_chunks(connection, held)
            beside = await self._connect(stack, f"live-migration lane {self._lane} tables")
            end_with(connection, beside)
            reader = LogReader(
                self._settings,
                self._lane,
                self._migration.topic_id.bytes,
                held.position,
                held.next_offset,
                self._budget,
            )
            stack.push_async_callback(reader.close)
            await reader.open()
            self._log.info("lane taken", next_offset=held.next_offset, position=str(held.position), epoch=held.epoch)
            # Asked over the session that applies: a target that crashes and forgets it ends this session, too.
            with asking("target", f"looking for the lanes that lane {self._lane} waits for"):
                is_met = self._meeting is not None and await has_met(connection, self._meeting)
            met_lsn = self._meeting.commit_lsn if self._meeting is not None and is_met else 0
            tables = TargetTables(beside, self._lane, self._meeting_of_chunks(stack, beside, lambda: decoder.decoded))
            decoder = LaneDecoder(tables, str(self._migration.id), met_lsn)
            await self._run_pipeline(held, connection, reader, decoder)

    def _meeting_of_chunks(
        self, stack: AsyncExitStack, target: asyncpg.Connection, decoded: Callable[[], Decoded]
    ) -> Callable[[int, Home], Awaitable[None]]:
        """Give what looks for a chunk that was made after the plan, on a session that is opened for the first of them and ends with the stack.

        `decoded`: tells which transaction is being decoded.
        """
        opened: list[asyncpg.Connection] = []

        async def meet(oid: int, home: Home) -> None:
            if not opened:
                opened.append(await stack.enter_async_context(self._source_session()))
            if await meet_chunk(opened[0], target, oid, home, decoded(), self._settings.lock_timeout):
                self._has_marks = True

        return meet

    def _source_session(self) -> AbstractAsyncContextManager[asyncpg.Connection]:
        return source_session(self._settings, self._migration, f"live-migration lane {self._lane}")

    async def _rebuild_chunks(self, connection: asyncpg.Connection, held: Checkpoint) -> None:
        """Copy what the lane has to copy before it goes on, each chunk in a transaction of its own."""
        with asking("target", f"looking for chunks of lane {self._lane}"):
            chunks = await due_chunks(connection, self._lane, held.position.commit_lsn, early=self._copies_early)
        if chunks:
            await self._copy_chunks(connection, held, chunks)
        with asking("target", f"looking for chunks of lane {self._lane}"):
            self._has_marks = bool(await due_chunks(connection, self._lane, 0, early=True))

    @property
    def _copies_early(self) -> bool:
        """Whether the lane cannot go on without its chunks, be their time come or not."""
        return self._refused_at is not None or self._unseen_at is not None

    async def _copy_chunks(
        self, connection: asyncpg.Connection, held: Checkpoint, chunks: Sequence[ChunkToRebuild]
    ) -> None:
        settings, migration_id = self._settings, self._migration.id
        whole: set[QualifiedName] = set()
        async with self._source_session() as source:
            async with (
                session(settings.source_uri(), "source", application="live-migration barrier") as other,
                giving_way(
                    settings.source_uri(),
                    source.get_server_pid(),
                    settings.lock_timeout,
                    f"chunks of lane {self._lane}",
                ),
            ):
                for chunk in chunks:
                    with asking("target", f"copying chunk {chunk.name}"):
                        applier = Applier(connection, self._lane)
                        await applier.begin()
                        await rebuild_chunk(
                            source,
                            connection,
                            chunk,
                            applied_lsn=held.position.commit_lsn,
                            lock_timeout=settings.lock_timeout,
                            flush=lambda: write_flush_barrier(other, migration_id),
                            on_wait=self._tell,
                            whole=whole,
                        )
                        await checkpoints.confirm(connection, held)
                        await connection.execute("commit")

    async def _tell(self, message: str) -> None:
        """Let people see what the lane waits for; on a session of its own, for the lane's has a transaction open."""
        self._log.info("lane waits", reason=message)
        async with session(self._settings.target_uri(), "target", application="live-migration lane") as target:
            with asking("target", "recording an event"):
                await record_event(target, "warning", f"lane {self._lane}: {message}")

    async def _has_chunks_to_copy(self, refused: ChangeRefused) -> bool:
        """Tell whether chunks of the lane wait to be copied anew, which may be why a change is refused: they are copied early then, once.

        So do suspects, which the coordinator may come to no more: an unseen DELETE leaves a row in the way of its key's next INSERT.
        """
        if self._refused_at == refused.position:
            return False
        try:
            await self._mark_suspects()
            async with session(self._settings.target_uri(), "target", application="live-migration lane") as target:
                with asking("target", f"looking for chunks of lane {self._lane}"):
                    chunks = await due_chunks(target, self._lane, 0, early=True)
        except LiveMigrationError:
            return False
        if chunks:
            self._refused_at = refused.position
            self._log.info("chunks are copied early", reason=refused.message, chunks=len(chunks))
        return bool(chunks)

    async def _passes_over(self, refused: ChangeRefused) -> bool:
        """Tell whether the lane goes on without the refused change's table, which is copied once more at the cutover."""
        try:
            async with session(self._settings.target_uri(), "target", application="live-migration lane") as target:
                with asking("target", f"passing over what lane {self._lane} has of {refused.relation}"):
                    is_passed_over = await pass_over(target, refused)
        except LiveMigrationError:
            return False
        if is_passed_over:
            self._log.warning("table is copied once more at the cutover, and passed over", reason=refused.message)
        return is_passed_over

    async def _mark_suspects(self) -> None:
        """Mark the lane's suspects to be copied early, and again behind what was decoded: what stands there may undo it."""
        decoded = self._decoded
        async with session(self._settings.target_uri(), "target", application="live-migration lane") as target:
            with asking("target", f"looking for suspects of lane {self._lane}"):
                suspects = {**self._suspects, **await read_lane_suspects(target, self._lane)}
            if not suspects:
                return
            async with self._source_session() as source:
                for home in set(suspects.values()):
                    with asking("source", f"looking for chunk {home.chunk}"):
                        oid = await find_chunk(source, home.chunk)
                    if oid is None:
                        continue
                    with asking("target", f"marking chunk {home.chunk}"):
                        reason, behind = "a change is refused, and it was compressed unwatched", decoded.commit_lsn + 1
                        await mark_chunk(target, oid, home, reason=reason, lsn=behind, is_new=True)

    async def _mark(self, error: ChunkChangedUnseen) -> None:
        """Have a chunk copied anew at the lane's next beginning.

        Where the target shows whole transactions only, what came before in the same one may not be applied yet, or was undone: it is copied
        again then.
        """
        self._log.info("chunk is copied anew", reason=error.message)
        event = (error.relation.oid, self._decoded.commit_lsn)
        if event == self._unseen_at:  # the copy did not show it: whatever keeps it from that, it is no reason to spin
            await asyncio.sleep(STOPPED_SECONDS)
        self._unseen_at = event
        behind = self._decoded.commit_lsn + 1 if self._migration.lane_count == 1 or error.is_undone else None
        try:
            async with self._source_session() as source:
                oid = await find_unseen(source, error.home, error.relation, self._tell)
            async with session(self._settings.target_uri(), "target", application="live-migration lane") as target:
                with asking("target", f"marking chunk {error.home.chunk}"):
                    await mark_chunk(
                        target,
                        oid,
                        error.home,
                        reason="rows changed unseen",
                        lsn=behind,
                        is_new=behind is not None,
                    )
        except LiveMigrationError as failure:
            await self._pause(failure)

    async def _meet(self, error: LanesMeet) -> None:
        """Wait for the other lanes of a table, with nothing in hand that they might need."""
        assert self._checkpoint is not None
        self._log.info("lane waits", reason=error.message)
        try:
            async with session(
                self._settings.target_uri(), "target", application=f"live-migration lane {self._lane}"
            ) as target:
                with asking("target", error.message):
                    await meet(target, self._checkpoint, error.meeting)
        except Fenced as fenced:
            self._log.info("lane left", reason=fenced.message)
            await asyncio.sleep(STANDBY_SECONDS)
        except LiveMigrationError as failure:
            await self._pause(failure)
        else:
            self._meeting = error.meeting

    async def _await_rebuild(self, error: RebuildFirst) -> None:
        """Begin again, which copies what is due, at once or when the coordinator has had the last transaction that it waits for end."""
        self._log.info("lane begins again", reason=error.message)
        await asyncio.sleep(STANDBY_SECONDS)

    async def _let_go(self, error: NotPlanned) -> bool:
        """Have the changes of a relation that is gone from the source again passed over; False when it is there."""
        try:
            async with self._source_session() as source:
                async with session(self._settings.target_uri(), "target", application="live-migration lane") as target:
                    return await let_go_if_gone(source, target, self._lane, error, self._decoded, self._tell)
        except LiveMigrationError as failure:
            self._log.warning("lane could not ask for a relation", reason=failure.message)
            return False

    async def _run_pipeline(
        self, held: Checkpoint, connection: asyncpg.Connection, reader: LogReader, decoder: LaneDecoder
    ) -> None:
        pipeline = LanePipeline(
            self._settings,
            held,
            connection,
            reader,
            decoder,
            self._budget,
            self._migration.lane_count,
            self._advanced,
            self._skips,
            self._careful_until,
            has_marks=lambda: self._has_marks,
        )
        try:
            await pipeline.run()
        except LiveMigrationError as error:
            self._decoded = decoder.decoded
            self._suspects = decoder.suspects
            if error.retry is Retry.STOP:
                self._careful_until = max(self._careful_until, pipeline.attempted)
            raise
        finally:
            connection.terminate()  # before anything that waits: the lane's successor waits for this

    def _advanced(self, reached: Checkpoint) -> None:
        self._checkpoint = reached
        self._refused_at = self._unseen_at = None
        self._backoff = _FIRST_BACKOFF_SECONDS
        self._on_progress(self._lane, reached.next_offset)

    async def _connect(
        self, stack: AsyncExitStack, application: str, *, sends_bulk: bool = False
    ) -> asyncpg.Connection:
        """Open a session that ends at once with the stack: what it was at is rolled back."""
        connection = await connect(
            self._settings.target_uri(), "target", application=application, sends_bulk=sends_bulk
        )
        stack.callback(connection.terminate)
        return connection

    async def _acquire(self, connection: asyncpg.Connection) -> Checkpoint:
        try:
            return await checkpoints.acquire(connection, self._lane, self._worker, self._migration.topic_id)
        except TimeoutError as error:
            raise ConnectionLost(f"lane {self._lane}: its last owner's session on the target does not end") from error

    async def _pause(self, error: LiveMigrationError) -> None:
        is_passing = isinstance(error.__cause__, asyncpg.TransactionRollbackError)  # a deadlock, say
        if not isinstance(error, TableStopped) and (error.retry is Retry.RECONNECT or is_passing):
            seconds = self._backoff * random.uniform(0.7, 1.3)
            self._backoff = min(self._backoff * 2, _LONGEST_BACKOFF_SECONDS)
            self._log.warning("lane begins again", reason=error.message, seconds=round(seconds, 1))
        else:
            seconds = _seconds_after(error)
            message = self._placed(error)
            self._log.error("lane stopped", reason=message, hint=error.hint, retry_seconds=seconds)
            await self._record(message, error.hint, error.as_json() if isinstance(error, ChangeRefused) else None)
        await asyncio.sleep(seconds)

    def _placed(self, error: LiveMigrationError) -> str:
        """Give the error with where the lane stands in the topic."""
        if self._checkpoint is None or isinstance(error, ChangeRefused):
            return error.message
        place = f"{self._settings.changes_topic}-{self._lane}-{self._checkpoint.next_offset}"
        kind = "" if isinstance(error, LaneStopped | TableStopped) else f"{type(error).__name__}: "
        return f"lane {self._lane} stands at {place} ({self._checkpoint.position}): {kind}{error.message}"

    async def _record(self, message: str, hint: str, refused: str | None) -> None:
        if self._checkpoint is None:
            return
        with suppress(LiveMigrationError):  # it is in our log, and written down at the next attempt
            async with session(self._settings.target_uri(), "target", application="live-migration lane") as connection:
                with asking("target", f"recording why lane {self._lane} stopped"):
                    epoch = self._checkpoint.epoch
                    await checkpoints.record_error(connection, self._lane, epoch, message, hint, refused)
