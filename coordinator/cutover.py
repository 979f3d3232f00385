"""Phase `cutover`: is the source quiet, is everything accounted for, two barriers, then the handover.

A request is a row in the state; whoever asks, asks there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

import asyncpg

from live_migration.common import state
from live_migration.common.catalog import sequence_positions
from live_migration.common.control import POSITION, LogPosition
from live_migration.common.errors import ConnectionLost, KafkaError, LiveMigrationError, PublicationLost, TargetError
from live_migration.common.kafka import ControlReader
from live_migration.common.postgres import asking, session, terminate_backend
from live_migration.common.progress import name_list
from live_migration.common.settings import Settings
from live_migration.common.state import Phase
from live_migration.coordinator import steps
from live_migration.coordinator.barrier import await_barrier, changes_between, emit_barrier, emit_heartbeat
from live_migration.coordinator.chunk_watch import follow_chunks, unpublished_chunks
from live_migration.coordinator.client_programs import ProgramError
from live_migration.coordinator.drift import find_drift, shape_differences
from live_migration.coordinator.dropped import settle_dropped
from live_migration.coordinator.handover import hand_over
from live_migration.coordinator.identity_watch import reconcile
from live_migration.coordinator.late_findings import (
    assess_roles,
    assess_taken_oids,
    assess_unreadable,
    find_missing_roles,
    find_taken_oids,
    find_unreadable,
)
from live_migration.coordinator.memberships import find_left, require_publications
from live_migration.coordinator.newcomers import Passing, bring_newcomers
from live_migration.coordinator.recopy import FENCE_LANES
from live_migration.coordinator.run import APPLICATION, Run
from live_migration.coordinator.schema import FolderError, read_post_data
from live_migration.coordinator.skip import describe_skips, read_skips
from live_migration.coordinator.source_changes import require_consent
from live_migration.coordinator.stranded_sessions import find_stranded, warn_of_stranded_rows
from live_migration.coordinator.timescale_handover import keep_aggregates
from live_migration.producer.publication import LockTimeout
from live_migration.producer.slot import OpenTransaction, SlotTimeout, describe_transactions, open_transactions

_QUIET_SECONDS = 10.0
_START_SECONDS = 10.0
_LOG_SECONDS = 30.0
_WAITS = "End that session or transaction, or wait for it, then ask for the cutover again."
# Whoever has a transaction open, which can commit nothing any more, could keep locks that the hand-over needs.
_AT_WORK = """
    select a.pid, a.backend_start from unnest($1::int[], $2::timestamptz[]) as held (pid, backend_start)
    join pg_stat_activity a using (pid, backend_start) where a.xact_start is not null
"""


class CutoverRefused(LiveMigrationError):
    """Something must be put right before the cutover; the migration stays in phase replay."""


class SourceBusy(LiveMigrationError):
    """Somebody still writes to the source; replay goes on and the cutover can be asked for again."""

    default_hint = "Stop every writer, then ask for the cutover again."


async def request_cutover(settings: Settings, *, patience: float = _START_SECONDS) -> str:
    """Ask the running coordinator for the cutover; gives what to tell the user.

    A coordinator that was started just now is given `patience` seconds to take its role.

    Raises:
        TargetError: no coordinator is alive, or the migration is done.
    """
    async with session(settings.target_uri(), "target", application=f"{APPLICATION} request") as target:
        with asking("target", "asking for the cutover"):
            migration = await state.require_migration(target)
            if migration.phase is Phase.DONE:
                raise TargetError("the migration is done already: the target is in charge")
            if not await _await_coordinator(target, patience):
                raise TargetError(
                    "no coordinator runs this migration, so nobody could cut over",
                    hint="Start `live-migration migrate` again, then ask for the cutover.",
                )
            await add_request(target)
            skipped = "".join(f"\n{line}" for line in describe_skips(await read_skips(target)))
    if migration.phase in (Phase.REPLAY, Phase.CUTOVER):
        return f"the coordinator was asked for the cutover{skipped}"
    return f"the coordinator was asked for the cutover; it begins after phase {migration.phase.value}{skipped}"


async def _await_coordinator(target: asyncpg.Connection, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not await is_coordinator_alive(target):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(0.1)
    return True


async def is_coordinator_alive(target: asyncpg.Connection) -> bool:
    """Tell whether a coordinator holds an unexpired lease and its session is connected."""
    return bool(
        await target.fetchval(
            """select owner is not null and lease_until > clock_timestamp()
                      and exists (select from pg_stat_activity a
                                  where a.pid = m.backend_pid and a.backend_start = m.backend_start)
               from _live_migration.migration m"""
        )
    )


async def add_request(target: asyncpg.Connection) -> None:
    """Record a request for the cutover, unless one is waiting, and wake the coordinator."""
    await target.execute(
        """insert into _live_migration.requests (kind) select 'cutover'
           where not exists (select from _live_migration.requests where kind = 'cutover' and handled_at is null)"""
    )
    await state.notify(target)


async def is_requested(run: Run) -> bool:
    """Tell whether a request waits."""
    with asking("target", "looking for requests"):
        return bool(
            await run.target.fetchval(
                "select exists (select from _live_migration.requests where kind = 'cutover' and handled_at is null)"
            )
        )


async def _answer(run: Run, result: str) -> None:
    await run.target.execute(
        """update _live_migration.requests set handled_at = clock_timestamp(), result = $1
           where kind = 'cutover' and handled_at is null""",
        result,
    )


async def cut_over(run: Run) -> None:
    """Cut over, from wherever an earlier attempt got to; ends in phase `done`.

    Raises:
        SourceBusy: the source is still written to; the migration is back in phase replay.
        CutoverRefused: tables are unaccounted for; the migration is back in phase replay.
        PublicationLost: a publication is gone or was altered; likewise.
        FolderError: --dir takes no file; likewise.
    """
    post_data = None
    async with run.source_session("cutover") as source:
        if not await steps.is_done(run.target, steps.BARRIER):
            try:
                post_data = await read_post_data(run)  # through a file: a disk that is full costs no downtime
                await _prove_everything_arrived(run, source)
            except (SourceBusy, CutoverRefused, PublicationLost, FolderError, ProgramError, TargetError) as error:
                # What fails once the barrier is recorded refuses nothing: the target is to take over, and no lane goes on.
                if not await steps.has_passed_barrier(run.target):
                    await _back_to_replay(run, error)
                raise
        await hand_over(run, source, post_data)
        await _warn_of_late_writes(run, source)
    await warn_of_stranded_rows(run)
    async with run.target_transaction("ending the migration"):
        await _answer(run, "done")
        await run.enter(Phase.DONE)
    await run.reload()


async def _back_to_replay(run: Run, error: LiveMigrationError) -> None:
    async with run.target_transaction("going back to replay"):
        await _answer(run, f"refused: {error.message}")
        await run.enter(Phase.REPLAY)
    await run.reload()


async def _prove_everything_arrived(run: Run, source: asyncpg.Connection) -> None:
    migration_id = str(run.migration.id)
    await _require_quiet(run, source)
    await _bring_what_came(run, source)
    first = await emit_barrier(source, migration_id)
    run.reporter.note("the first barrier is in the WAL; waiting until the target has reached it")
    positions = await await_barrier(run, first, what="first barrier")
    late = [p for p in positions if not first.before_lsn <= p.commit_lsn <= first.after_lsn]
    if late:
        raise await _busy(source, "")
    await _require_quiet(run, source)
    # Between the barriers: what invalidates a bucket later is a write that refuses the cutover, and a refresh that takes it is one, too.
    await keep_aggregates(run, source)
    second = await emit_barrier(source, migration_id)
    await await_barrier(run, second, what="second barrier")
    between = await changes_between(run.settings, {p.lane: p.next_offset for p in positions}, second)
    if between.changed:
        raise await _busy(source, f" to {name_list(between.changed)}")
    asked = await emit_heartbeat(source, migration_id)
    if unpublished := await unpublished_chunks(run, source):
        raise await _busy(source, f" to chunks that were made meanwhile: {name_list(unpublished)}")
    await _require_accounted_for(run, source, is_last=True)
    await reconcile(run, source)
    is_passed = await _is_passed(run, between.commit_lsn, asked)
    if is_passed is None:
        raise SourceBusy(
            f"whether the source was written to after the last barrier could not be asked: the change log did not come so far within {_LOG_SECONDS:g} s",
            hint="See that producer and broker run, then ask for the cutover again.",
        )
    if is_passed:
        raise await _busy(source, "", "after the last barrier")
    await _record_barrier(run, between.commit_lsn)


async def _bring_what_came(run: Run, source: asyncpg.Connection) -> None:
    """Bring newcomers and chunks, and refuse the cutover while any is not followed."""
    problems = await bring_newcomers(run, source)
    lines = [f"{name} cannot be brought: {why}" for name, why in problems.items()]
    if lines and all(isinstance(why, Passing) for why in problems.values()):
        raise SourceBusy("; ".join(lines), hint=_WAITS)
    await _require_accounted_for(run, source, lines)
    try:
        await follow_chunks(run, source, run.target)
    except (SlotTimeout, LockTimeout) as error:
        raise SourceBusy(
            f"chunks that came since the plan wait to be followed: {error.message}", hint=_WAITS
        ) from error


async def _record_barrier(run: Run, barrier_lsn: int) -> None:
    """Record it, and have no lane write to the target from here on: one that begins again would copy chunks beside the hand-over."""
    async with run.target_transaction("recording the barrier") as target:
        held = await target.fetch(
            "select backend_pid, backend_start from _live_migration.checkpoints where backend_pid is not null"
        )
        await target.execute(FENCE_LANES)  # first, for it may wait: nobody is to wait for the migration's row meanwhile
        await target.execute("update _live_migration.migration set cutover_lsn = $1", barrier_lsn)
        await steps.finish(target, run.epoch, steps.BARRIER)
    with asking("target", "ending what lanes are at"):
        for row in await run.target.fetch(
            _AT_WORK, [row["backend_pid"] for row in held], [row["backend_start"] for row in held]
        ):
            await terminate_backend(run.target, row["pid"], row["backend_start"])
    run.reporter.note("the target holds every change of the source")


async def _busy(source: asyncpg.Connection, to: str, when: str = "between the two barriers") -> SourceBusy:
    with asking("source", "looking who writes"):
        rows = await source.fetch(
            """select format('pid %s (%s%s, user %s)', pid, coalesce(nullif(application_name, ''), 'no application name'),
                             case when backend_type = 'client backend' then '' else ', a ' || backend_type end, usename) as who
               from pg_stat_activity
               where datname = current_database() and pid <> pg_backend_pid()
                 and (backend_type = 'client backend' or backend_type ~ '^logical replication .*worker$')
                 and application_name not like $1
               order by state_change desc nulls last limit 10""",
            f"{APPLICATION}%",
        )
    who = name_list(row["who"] for row in rows) or "sessions that have left since"
    return SourceBusy(f"the source was written{to} {when}; connected are: {who}")


async def _require_quiet(run: Run, source: asyncpg.Connection) -> None:
    """Wait a little for open transactions of the source's database that have written to end."""
    deadline = time.monotonic() + _QUIET_SECONDS
    while True:
        with asking("source", "looking at open transactions"):
            database = await source.fetchval("select current_database()::text")
            writers = [t for t in await open_transactions(source, database=database) if not _is_ours(t)]
        prepared = [t for t in writers if t.gid is not None]
        if not writers:
            return
        if prepared or time.monotonic() > deadline:
            raise SourceBusy(
                f"transactions on the source have written and are not ended: {describe_transactions(prepared or writers)}",
                hint="End them (a prepared one by COMMIT PREPARED or ROLLBACK PREPARED), then ask for the cutover again.",
            )
        await asyncio.sleep(0.1)


def _is_ours(transaction: OpenTransaction) -> bool:
    return transaction.application.startswith(APPLICATION)


async def _require_accounted_for(
    run: Run, source: asyncpg.Connection, problems: Sequence[str] = (), *, is_last: bool = False
) -> None:
    """Refuse while a table of the source is not on the target as it is, or not followed; `problems`: what else is known to be."""
    found = [*problems, *(await find_drift(run, source, run.target)).lines]
    found += await settle_dropped(run, source)
    found += await shape_differences(run, source, run.target)
    if not is_last:  # what comes between the barriers is named at the end: it is a long look, and users wait
        found += await require_consent(run, source, run.target)
    with asking("source", "looking at what comes after the last barrier"):
        late = [
            *assess_roles(await find_missing_roles(source, run.target), is_begun=True),
            *assess_taken_oids(await find_taken_oids(source, run.target)),
            *assess_unreadable(await find_unreadable(source)),
        ]
    found += [finding.what for finding in late]
    found += await find_stranded(run)
    await require_publications(run, source, run.target)
    found += [
        f"{left} is not published any more, or not all of it: `live-migration migrate` publishes and copies it again"
        for left in await find_left(run, source, run.target)
    ]
    with asking("target", "looking at tables and indexes"):
        tables = await run.target.fetch(
            """select format('%s.%s is %s', schema_name, table_name, state) || coalesce(': ' || error, '') as line
               from _live_migration.tables where state <> 'ready'
               union all
               select format('%s.%s was made on the source and is not followed yet', schema_name, table_name)
               from _live_migration.tables where newcomer = 'made' order by 1"""
        )
        indexes = await run.target.fetch(
            """select format('index %s is %s', name, state) || coalesce(': ' || error, '') as line
               from _live_migration.indexes where state <> 'done' order by 1"""
        )
    found += [row["line"] for row in (*tables, *indexes)]
    if found:
        raise CutoverRefused(
            "the cutover is refused:" + "".join(f"\n  - {line}" for line in found),
            hint="Put this right on source or target (ALTER the target, drop what is not needed), then run "
            "`live-migration migrate` and ask for the cutover again.",
        )


async def _warn_of_late_writes(run: Run, source: asyncpg.Connection) -> None:
    """Warn when the change log, or a sequence, went on after the last barrier: somebody wrote to the source during the handover.

    A sequence also tells of many a row that no stream carries: one of an unlogged table, say.
    """
    with asking("target", "reading checkpoints"):
        last = int(await run.target.fetchval("select cutover_lsn from _live_migration.migration"))
    is_passed = await _is_passed(run, last, await emit_heartbeat(source, str(run.migration.id)))
    if is_passed is not False:
        found = "could not be asked whether it" if is_passed is None else "was written to after the last barrier: it"
        run.reporter.warning(
            f"the source {found} has changes that the target may lack. Run `live-migration verify` before you trust it."
        )
    if moved := await _sequences_apart(run, source):
        run.reporter.warning(
            f"sequences of the source went on after they were set on the target: {name_list(moved)}. The source was written to: it may have rows "
            "that the target lacks. Run `live-migration verify` before you trust it."
        )


async def _is_passed(run: Run, barrier_lsn: int, asked: int) -> bool | None:
    """Tell whether any lane went on behind the barrier that commits at `barrier_lsn`, in whatever the log holds up to `asked`; None: it does not say.

    The barrier's own commit, and not where the WAL ends after it: another transaction may have committed in between.
    """
    position = await _await_log(run, asked)
    with asking("target", "reading checkpoints"):
        applied = await run.target.fetchval("select max(commit_lsn) from _live_migration.checkpoints")
    published = [lsn for lsn, _ in position.lanes] if position is not None else []
    if max(int(applied), *published, 0) > barrier_lsn:
        return True
    return None if position is None else False


async def _sequences_apart(run: Run, source: asyncpg.Connection) -> list[str]:
    with asking("source", "reading sequences"):
        theirs = {name: at async for some in sequence_positions(source) for name, *at in some}
    with asking("target", "reading sequences"):
        ours = {name: at async for some in sequence_positions(run.target) for name, *at in some}
    return sorted(str(name) for name in theirs.keys() & ours.keys() if theirs[name] != ours[name])


async def _await_log(run: Run, lsn: int) -> LogPosition | None:
    """Wait until the change log holds everything before `lsn`; None when that does not come to pass, be it that the broker is gone for good."""
    with suppress(TimeoutError, ConnectionLost, KafkaError):
        async with asyncio.timeout(_LOG_SECONDS), ControlReader(run.settings) as reader:
            while True:
                control = await reader.read()
                if POSITION in control:
                    position = LogPosition.model_validate_json(control[POSITION])
                    if position.confirm_lsn > lsn:
                        return position
                await asyncio.sleep(0.05)
    return None
