"""The conductor: begins or resumes a migration and leads it through its phases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress

import asyncpg

from live_migration.common import state
from live_migration.common.errors import KafkaAway, LaneStopped, LiveMigrationError, Retry
from live_migration.common.postgres import asking, connect, session
from live_migration.common.settings import Settings
from live_migration.common.state import Phase
from live_migration.coordinator import steps
from live_migration.coordinator.absent import watch_absent
from live_migration.coordinator.beside import beside, translated
from live_migration.coordinator.chunk_watch import watch_chunks
from live_migration.coordinator.cutover import SourceBusy, cut_over
from live_migration.coordinator.drift import watch_drift
from live_migration.coordinator.handover import finish_after_handover
from live_migration.coordinator.held import say_what_is_held
from live_migration.coordinator.identity_watch import watch_identities
from live_migration.coordinator.lease_watch import watch_leases
from live_migration.coordinator.losses import find_loss
from live_migration.coordinator.newcomers import watch_newcomers
from live_migration.coordinator.observer import Observer, Reporter
from live_migration.coordinator.opening import open_migration
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.publication_watch import publish_again, watch_publications
from live_migration.coordinator.recopy import begin_recopy
from live_migration.coordinator.recopy_chunks import renew_chunks
from live_migration.coordinator.run import APPLICATION, Run, target_session
from live_migration.coordinator.schema import restore_schema
from live_migration.coordinator.slot_watch import watch_slot
from live_migration.coordinator.source_changes import warn_of_lacking
from live_migration.coordinator.timeline_watch import follow_timeline, watch_timeline
from live_migration.coordinator.trimming import watch_trimming
from live_migration.coordinator.waiting import await_copy, await_cutover_request
from live_migration.coordinator.workers import WorkerPool

__all__ = ["Observer", "conduct"]

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0
_STEADY_SECONDS = 60.0
_HEARTBEAT_SECONDS = 5.0
_ENDING_SECONDS = 10.0
_UNFINISHED = (
    "the target is in charge, but what follows the hand-over is not finished (foreign keys, compression, jobs, statistics): run "
    "`live-migration migrate` again, which needs the source no more"
)


async def conduct(
    settings: Settings, *, stop: asyncio.Event, ask_cutover: asyncio.Event, observer: Observer, recopy: bool = False
) -> None:
    """Run a migration from wherever it is to its end, or until `stop` is set; then the next call goes on.

    With `recopy` every table is copied again first, which is refused unless slot or change log are lost.
    Lost connections are made anew for ever once the migration has begun.

    Raises:
        LiveMigrationError: something stands in the way; the message says what is to be done.
    """
    reporter = Reporter(observer)
    opened = await open_migration(settings, reporter, must_exist=recopy)
    if opened is None:
        return
    try:
        async with WorkerPool(opened, reporter) as pool:
            await _until(stop, _Conductor(opened, reporter, pool, ask_cutover, recopy=recopy).run())
    finally:
        await say_what_is_held(opened, reporter)


async def _record_broker(run: Run) -> None:
    """Record the broker's address, which may be another one now: only who leads the migration, once its topics were found there."""
    if run.settings.kafka_servers() != run.migration.kafka:
        async with run.target_transaction("recording the broker's address") as target:
            await target.execute("update _live_migration.migration set kafka = $1", run.settings.kafka_servers())
        await run.reload()


async def _is_work_left(run: Run) -> bool:
    """Tell whether anything is left for producer and consumers: nothing is behind the last barrier."""
    async with run.target_session("workers") as target:
        return not await steps.has_passed_barrier(target)


async def _until(stop: asyncio.Event, work: Coroutine[None, None, None]) -> None:
    """Run the work until it ends or `stop` is set, then cancel it."""
    task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
    finally:
        for each in (task, stopping):
            each.cancel()
        await asyncio.wait((task, stopping))


class _Conductor:
    def __init__(
        self,
        settings: Settings,
        reporter: Reporter,
        pool: WorkerPool,
        ask_cutover: asyncio.Event,
        *,
        recopy: bool,
    ) -> None:
        self._settings = settings
        self._reporter = reporter
        self._pool = pool
        self._ask_cutover = ask_cutover
        self._recopy = recopy
        self._owner = state.worker_id("coordinator")
        self._shown: Phase | None = None

    async def run(self) -> None:
        """Lead the migration to its end, over lost connections."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            try:
                await self._with_lease()
                return
            except Exception as error:
                lost = translated(error)
                if lost.retry is not Retry.RECONNECT:
                    raise lost from error
            if time.monotonic() - began > _STEADY_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self._reporter.warning(f"{lost.message}; trying again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    async def _with_lease(self) -> None:
        keeper = await connect(self._settings.target_uri(), "target", application=f"{APPLICATION} coordinator")
        try:
            epoch = await state.acquire_coordinator_lease(
                keeper, self._owner, self._settings.lease, end_elsewhere=self._end_on_source
            )
            try:
                async with target_session(self._settings, self._owner, "conductor") as target:
                    run = Run(self._settings, self._reporter, target, epoch, await state.require_migration(target))
                    await beside(self._lead(run), [self._keep(keeper, epoch)])
            finally:
                await self._give_up_lease(keeper, epoch)
        finally:
            keeper.terminate()

    async def _end_on_source(self, predecessor: str) -> None:
        """End what a predecessor that was stopped has open on the source, locks on users' tables with it; one that is off holds none."""
        uri = self._settings.source_uri()
        try:
            async with (
                asyncio.timeout(_ENDING_SECONDS),
                session(uri, "source", application=f"{APPLICATION} succession") as source,
            ):
                await state.end_sessions(source, predecessor)
        except (LiveMigrationError, TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            why = error.message if isinstance(error, LiveMigrationError) else str(error) or type(error).__name__
            self._reporter.warning(
                f"whether {predecessor} left sessions on the source, and locks with them, cannot be looked at: {why}"
            )

    async def _keep(self, keeper: asyncpg.Connection, epoch: int) -> None:
        """Renew the lease, show that we live, save what was told; never returns."""
        beats = 0
        interval = min(1.0, self._settings.lease / 4)
        while True:
            with asking("target", "renewing the coordinator's lease"):
                await state.renew_coordinator_lease(keeper, epoch, self._settings.lease)
                if beats % round(_HEARTBEAT_SECONDS / interval) == 0:
                    await state.heartbeat(keeper, self._owner, "coordinator")
                await self._reporter.save(keeper)
            beats += 1
            await asyncio.sleep(interval)

    async def _give_up_lease(self, keeper: asyncpg.Connection, epoch: int) -> None:
        with suppress(TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            async with asyncio.timeout(5):
                await self._reporter.save(keeper)
                await keeper.execute("delete from _live_migration.workers where id = $1", self._owner)
                await state.release_coordinator_lease(keeper, epoch)

    async def _lead(self, run: Run) -> None:
        if self._recopy:
            await begin_recopy(run)
            self._recopy = False
        self._show(run)
        is_resumed = run.phase is not Phase.PREPARE
        if not is_resumed:
            await _record_broker(run)
            await prepare(run)
            self._show(run)
        if run.phase is not Phase.DONE:
            may_tell = asyncio.Event()
            # These guard the source, and need no broker: they look from the first moment on.
            guards = [watch_identities(run, may_tell), watch_slot(run)]
            await beside(self._lead_guarded(run, may_tell, is_resumed=is_resumed), guards)
        await self._pool.stop()
        await self._finish(run)

    async def _lead_guarded(self, run: Run, may_tell: asyncio.Event, *, is_resumed: bool) -> None:
        if is_resumed:
            await self._resume(run, may_tell)
        may_tell.set()
        await self._pool.start()
        watchers = [self._pool.watch(lambda: _is_work_left(run)), watch_timeline(run)]
        await beside(self._lead_to_done(run), watchers)

    async def _resume(self, run: Run, may_tell: asyncio.Event) -> None:
        """Go on from where an earlier coordinator, or we ourselves, left the migration; wait here for a broker that is away."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                await self._require_whole(run)
                may_tell.set()  # not before: the topics may be others than ours
                await follow_timeline(run)
                await publish_again(run)
                self._show(run)
                # An earlier coordinator may have died before it told the producer what it had prepared or published.
                await run.publications_changed(run.target)
                return
            except KafkaAway as error:
                self._reporter.warning(f"{error.message}; trying again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    async def _finish(self, run: Run) -> None:
        """Do what follows the hand-over, and say how to go on with it should it not come to its end."""
        try:
            await finish_after_handover(run)
        except BaseException as error:
            if not (isinstance(error, LiveMigrationError) and error.retry is Retry.RECONNECT):
                self._reporter.warning(_UNFINISHED)
            raise

    async def _require_whole(self, run: Run) -> None:
        """Raise what is lost of slot or log, before anybody works with what is left; nothing is after the last barrier."""
        if await steps.has_passed_barrier(run.target):
            return
        if (loss := await find_loss(run)) is not None:
            raise loss
        await _record_broker(run)

    async def _lead_to_done(self, run: Run) -> None:
        if run.phase is Phase.SCHEMA:
            await renew_chunks(run)
            await restore_schema(run)
            self._show(run)
        await beside(
            self._follow(run),
            [
                watch_drift(run),
                watch_trimming(run),
                watch_chunks(run),
                watch_newcomers(run),
                watch_publications(run),
                watch_leases(run),
                watch_absent(run),
            ],
        )

    async def _follow(self, run: Run) -> None:
        if run.phase is Phase.COPY:
            await await_copy(run)
            self._show(run)
        while run.phase is not Phase.DONE:
            if run.phase is Phase.REPLAY:
                await await_cutover_request(run, self._ask_cutover)
                self._show(run)
            try:
                await cut_over(run)
            except (SourceBusy, LaneStopped) as error:
                self._reporter.warning(f"no cutover, replay goes on: {error}")
            self._show(run)
        await warn_of_lacking(run)

    def _show(self, run: Run) -> None:
        if self._shown is not run.phase:
            self._shown = run.phase
            self._reporter.phase_changed(run.phase)
            if run.phase is Phase.DONE:
                self._reporter.note("done: write to the target now")
