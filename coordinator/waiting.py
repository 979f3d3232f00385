"""What the conductor does in phases `copy` and `replay`: it waits for the consumers, and names what stops them."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import asyncpg

from live_migration.common.control import POSITION, LogPosition
from live_migration.common.errors import ConnectionLost
from live_migration.common.kafka import ControlReader
from live_migration.common.postgres import asking
from live_migration.common.progress import Lag, LagMeter
from live_migration.common.state import Phase
from live_migration.coordinator import cutover
from live_migration.coordinator.partitioned_indexes import build_partitioned_indexes
from live_migration.coordinator.run import Run
from live_migration.coordinator.timescale_catalog import end_restoring

_POLL_SECONDS = 0.25
_LAG_SECONDS = 2.0
_READ_SECONDS = 10.0

_UNREADY = """
    select (select count(*) from _live_migration.tables where state <> 'ready') as tables,
           (select count(*) from _live_migration.indexes where state <> 'done') as indexes
"""
_TROUBLES = """
    select 'table ' || schema_name || '.' || table_name as about, error, hint from _live_migration.tables
    where error is not null and (not copy_again or is_passed_over)
    union all
    select 'index ' || name, error, null from _live_migration.indexes where error is not null
    union all
    select 'lane ' || lane, error, hint from _live_migration.checkpoints where error is not null
"""


async def await_copy(run: Run) -> None:
    """Wait until every table is copied and indexed, put partitioned indexes together, then enter phase `replay`."""
    troubles = _Troubles(run)
    while True:
        with asking("target", "looking at the copy"):
            unready = await run.target.fetchrow(_UNREADY)
        if not unready["tables"] and not unready["indexes"]:
            break
        await troubles.report()
        await asyncio.sleep(_POLL_SECONDS)
    await build_partitioned_indexes(run)
    await end_restoring(run)
    async with run.target_transaction("leaving phase copy"):
        await run.enter(Phase.REPLAY)
    await run.reload()


async def await_cutover_request(run: Run, ask_cutover: asyncio.Event) -> None:
    """Wait until somebody asks for the cutover, or with `--cutover auto` until the target has caught up; then enter it."""
    troubles = _Troubles(run)
    async with run.source_session("lag") as source, LogEnd(run) as log_end:
        meter = LagMeter(run.migration.start_lsn or 0)
        measured, caught_up = 0.0, 0
        is_announced = False
        while not await cutover.is_requested(run):
            if ask_cutover.is_set():
                ask_cutover.clear()
                with asking("target", "recording the request"):
                    await cutover.add_request(run.target)
                continue
            await troubles.report()
            if (is_auto := run.settings.cutover == "auto") or not is_announced:
                if time.monotonic() - measured >= _LAG_SECONDS:
                    measured = time.monotonic()
                    lag = await read_lag(run, source, log_end, meter)
                    caught_up = caught_up + 1 if lag is not None and lag.is_caught_up else 0
                if caught_up >= 2 and is_auto:
                    with asking("target", "recording the request"):
                        await cutover.add_request(run.target)
                elif caught_up and not is_auto:
                    is_announced = True
                    run.reporter.note(
                        "the target has caught up: stop all writers on the source, then ask for the cutover"
                    )
            await asyncio.sleep(_POLL_SECONDS)
    async with run.target_transaction("entering phase cutover"):
        await run.enter(Phase.CUTOVER)
    await run.reload()


class LogEnd:
    """How far the change log reaches: one reader of the control topic, kept open, and made anew after an error."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stack = AsyncExitStack()
        self._reader: ControlReader | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def read(self) -> LogPosition | None:
        """Give the newest position; None while the producer has sent nothing or the broker is away, which is said once."""
        try:
            async with asyncio.timeout(_READ_SECONDS):
                if self._reader is None:
                    self._reader = await self._stack.enter_async_context(ControlReader(self._run.settings))
                control = await self._reader.read()
        except (ConnectionLost, TimeoutError) as error:
            await self._close()
            reason = error.message if isinstance(error, ConnectionLost) else "Kafka does not answer"
            self._run.reporter.warn_on_change("lag", f"how far the target is behind is not known: {reason}")
            return None
        self._run.reporter.warn_on_change("lag", "")
        return LogPosition.model_validate_json(control[POSITION]) if POSITION in control else None

    async def _close(self) -> None:
        self._reader = None
        stack, self._stack = self._stack, AsyncExitStack()
        await stack.aclose()


async def read_lag(run: Run, source: asyncpg.Connection, log_end: LogEnd, meter: LagMeter) -> Lag | None:
    """Measure the lag; None while the log's end is not known."""
    position = await log_end.read()
    if position is None:
        return None
    with asking("target", "reading checkpoints"):
        rows = await run.target.fetch("select lane, commit_lsn, ordinal from _live_migration.checkpoints")
    with asking("source", "reading the WAL's end"):
        source_lsn = int(await source.fetchval("select pg_current_wal_lsn()"))
    return meter.read(
        time.monotonic(),
        source_lsn=source_lsn,
        log_end=position.confirm_lsn,
        log_lanes=position.lanes,
        checkpoints={row["lane"]: (int(row["commit_lsn"]), row["ordinal"]) for row in rows},
    )


class _Troubles:
    """Names errors that consumers record, each once until it changes."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._known: set[str] = set()

    async def report(self) -> None:
        with asking("target", "looking for errors"):
            rows = await self._run.target.fetch(_TROUBLES)
        found = {row["about"]: row for row in rows}
        for about, row in found.items():
            hint = f"\n  hint: {row['hint']}" if row["hint"] else ""
            self._run.reporter.warn_on_change(about, f"{about}: {row['error']}{hint}")
        for about in self._known - found.keys():
            self._run.reporter.warn_on_change(about, "")
            self._run.reporter.note(f"{about}: the trouble is over")
        self._known = set(found)
