"""The demo: two servers, a broker, a writer under load, and a whole migration between them."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from live_migration.common.errors import LiveMigrationError
from live_migration.common.local_kafka import LocalKafka
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.progress import format_bytes, format_count, format_duration
from live_migration.common.settings import Settings, load_settings
from live_migration.common.state import Phase
from live_migration.common.supervisor import ChildGuard, log_tail
from live_migration.common.tasks import TaskGroup
from live_migration.coordinator.conductor import conduct
from live_migration.coordinator.display import Display
from live_migration.coordinator.report import print_result
from live_migration.coordinator.status import Status
from live_migration.coordinator.verify import Report, verify
from live_migration.coordinator.workload import Writer, fill

_SERVER_SETTINGS = {
    "wal_level": "logical",
    "max_connections": "100",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
}
_CATCH_UP_SECONDS = 120.0


@dataclass(slots=True)
class _Outcome:
    """What the summary tells. Times in seconds."""

    copied: float = 0.0
    replayed: float = 0.0
    downtime: float = 0.0
    commits: int = 0
    status: Status | None = None
    report: Report | None = None


class _DemoDisplay(Display):
    """Notes when the phases begin."""

    def __init__(self) -> None:
        super().__init__(Console(stderr=True), "")
        self.begun: dict[Phase, float] = {}
        self.done = asyncio.Event()
        self.replaying = asyncio.Event()

    def phase_changed(self, phase: Phase) -> None:
        self.begun.setdefault(phase, time.monotonic())
        super().phase_changed(phase)
        if phase is Phase.REPLAY:
            self.replaying.set()
        elif phase is Phase.DONE:
            self.done.set()


async def run_demo(*, rows: int, seconds: float) -> bool:
    """Migrate a database of about `rows` rows under load; tell whether source and target are equal in the end.

    Args:
        seconds: how long replay goes on under load once every table is copied.
    """
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        settings = await _start_servers(stack)
        _say(f"filling the source with about {format_count(rows)} rows")
        await fill(settings.source_uri(), rows)
        writer = await stack.enter_async_context(Writer(settings.source_uri()))
        _say("a writer changes them from 4 connections; the migration begins")
        outcome = _Outcome()
        try:
            await _migrate(settings, writer, seconds, outcome)
        except LiveMigrationError:
            _show_logs(settings.dir / "logs")
            raise
        _say("comparing source and target")
        outcome.report = await verify(settings, observe=print_result)
        _summarize(outcome, time.monotonic() - began)
        return outcome.report.is_equal


async def _start_servers(stack: AsyncExitStack) -> Settings:
    """Start source, target and broker, all in temporary folders that go with us."""
    _say("starting two PostgreSQL servers and a Kafka broker")
    guard = await ChildGuard.open()
    stack.push_async_callback(guard.close)
    folder = guard.make_folder("live-migration-demo")
    source = LocalPostgres(settings=_SERVER_SETTINGS)
    target = LocalPostgres(settings=_SERVER_SETTINGS)
    broker = LocalKafka()
    for server in (source, target, broker):
        stack.push_async_callback(server.stop)
    async with TaskGroup() as group:
        for server in (source, target, broker):
            group.create_task(server.start())
    _say(f"source {source.uri()}, target {target.uri()}, Kafka {broker.bootstrap}")
    return load_settings(
        {
            "source": source.uri(),
            "target": target.uri(),
            "kafka": broker.bootstrap,
            "dir": folder,
            "consumers": 2,
            "workers": True,
            "name": "demo",
            "cutover": "ask",
        }
    )


async def _migrate(settings: Settings, writer: Writer, seconds: float, outcome: _Outcome) -> None:
    ask_cutover = asyncio.Event()
    async with _DemoDisplay() as display, TaskGroup() as group:
        showing = group.create_task(display.follow(settings))
        conducting = group.create_task(
            conduct(settings, stop=asyncio.Event(), ask_cutover=ask_cutover, observer=display)
        )
        await display.replaying.wait()
        outcome.copied = time.monotonic() - display.begun[Phase.COPY]
        await asyncio.sleep(seconds)
        await _await_catch_up(display)
        await writer.stop()
        stopped = time.monotonic()
        display.note(f"the writer has stopped after {format_count(writer.commits)} transactions: cutover")
        ask_cutover.set()
        await display.done.wait()
        outcome.downtime = display.begun[Phase.DONE] - stopped
        outcome.replayed = display.begun[Phase.DONE] - display.begun[Phase.REPLAY]
        await conducting
        await display.refresh(settings)
        showing.cancel()
    outcome.status = display.last
    outcome.commits = writer.commits


async def _await_catch_up(display: Display) -> None:
    try:
        async with asyncio.timeout(_CATCH_UP_SECONDS):
            while not (display.last and display.last.lag and display.last.lag.is_caught_up):
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise LiveMigrationError(
            f"the target has not caught up within {_CATCH_UP_SECONDS:.0f} s",
            hint="Is this machine busy? Try fewer --rows.",
        ) from None


def _summarize(outcome: _Outcome, total: float) -> None:
    status, report = outcome.status, outcome.report
    if status is None or report is None:
        return
    totals = status.totals
    _say("")
    _say(
        f"rows copied       {format_count(totals.row_count)} in {totals.tables} tables, {format_bytes(totals.byte_count)}, "
        f"in {outcome.copied:.1f} s with their indexes ({format_count(totals.row_count / max(outcome.copied, 0.001))} rows/s)"
    )
    _say(
        f"changes replayed  {format_count(status.change_count)} of {format_count(outcome.commits)} transactions, "
        f"in {outcome.replayed:.1f} s ({format_count(status.change_count / max(outcome.replayed, 0.001))} changes/s)"
    )
    _say(f"downtime          {format_duration(outcome.downtime)} from the writer's stop to done")
    different = ", ".join(f"{each.kind} {each.name}" for each in report.differences)
    _say(f"comparison        {'every row is equal' if report.is_equal else f'DIFFERENT: {different}'}")
    _say(f"the whole demo    {format_duration(total)}")


def _show_logs(folder: Path) -> None:
    for log in sorted(folder.glob("*.log")):
        _say(f"--- the end of {log.name}\n{log_tail(log)}")


def _say(message: str) -> None:
    click.echo(message, err=True)
