"""What `migrate` shows: progress bars and the lag line on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from live_migration.common.errors import LiveMigrationError
from live_migration.common.progress import (
    LagState,
    TableProgress,
    format_bytes,
    format_clock,
    format_count,
    remaining_seconds,
)
from live_migration.common.settings import Settings
from live_migration.common.state import Phase
from live_migration.coordinator.status import Status, StatusReader

PLAIN_SECONDS = 10.0
_REFRESH_SECONDS = 1.0
_SHARE = 10
"""The pause after a look is at least so many times what the look took: with many thousand tables it is not nothing."""
_TABLES_SHOWN = 15
_REPLAYING = (Phase.REPLAY, Phase.CUTOVER)


def copy_line(status: Status) -> str:
    """Give the copy's progress in one line."""
    totals = status.totals
    parts = [
        f"copying: {totals.tables_copied} of {totals.tables} tables",
        f"{format_count(totals.row_count)} rows",
        f"{format_bytes(totals.done_bytes)} of {format_bytes(totals.size_bytes)}",
    ]
    if status.row_rate:
        parts.append(f"{format_count(status.row_rate)} rows/s")
    if status.byte_rate:
        parts.append(f"{format_bytes(status.byte_rate)}/s")
    if (remaining := _copy_remaining(status)) is not None:
        parts.append(f"ETA {format_clock(remaining)}")
    if status.indexes.total:
        parts.append(f"indexes {status.indexes.done} of {status.indexes.total}")
    return ", ".join(parts)


def _copy_remaining(status: Status) -> float | None:
    """Give the time until the copy is done; a row has another size on the source than in the copy's stream."""
    totals = status.totals
    rate = None
    if status.byte_rate and totals.byte_count:
        rate = status.byte_rate * totals.done_bytes / totals.byte_count
    return remaining_seconds(totals.done_bytes, totals.size_bytes, rate)


def replay_line(status: Status) -> str:
    """Give the lag line, and what is applied so far."""
    if status.lag is None:
        return "Waiting for the change log: the producer has not begun, or Kafka cannot be reached"
    applied = f"{format_count(status.change_count)} changes applied"
    rate = f", {format_count(status.change_rate)}/s" if status.change_rate is not None else ""
    return f"{status.lag.line}; {applied}{rate}"


def progress_line(status: Status) -> str | None:
    """Give the one line that says how far the migration is; None where its phase alone says it."""
    match status.migration.phase:
        case Phase.COPY:
            return copy_line(status)
        case Phase.REPLAY | Phase.CUTOVER:
            return replay_line(status)
        case Phase.PREPARE | Phase.SCHEMA | Phase.DONE:
            return None


def stop_hint(*, has_keys: bool) -> str:
    """Say how replication is stopped, and the cutover begun, in `migrate`."""
    if has_keys:
        return "To stop replication, hit 'c' and then ENTER"
    return f"To stop replication, run `live-migration cutover` or send SIGUSR1 (kill -USR1 {os.getpid()})"


class _Renderer(Protocol):
    def message(self, text: str, style: str) -> None:
        """Print a line that stays."""

    def progress(self, status: Status) -> None:
        """Show where the migration is."""

    def close(self) -> None:
        """Take what does not stay off the screen."""


class Display:
    """Implements the conductor's Observer, and shows progress that it reads by itself; `async with` around it."""

    def __init__(self, console: Console, hint: str, *, plain_seconds: float = PLAIN_SECONDS) -> None:
        """Show on `console`; `hint`, which may be empty, says how to cut over once the target has caught up."""
        self._renderer: _Renderer = (
            _LiveRenderer(console, hint) if console.is_terminal else _PlainRenderer(console, hint, plain_seconds)
        )
        self._phase_changed = asyncio.Event()
        self.phase: Phase | None = None
        self.last: Status | None = None
        """What was read last."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._renderer.close()

    def phase_changed(self, phase: Phase) -> None:
        """Show the phase, and its progress at once."""
        self.phase = phase
        self._renderer.message(f"phase {phase.value}", "bold")
        self._phase_changed.set()

    def note(self, message: str) -> None:
        """Show a line of progress."""
        self._renderer.message(message, "")

    def warning(self, message: str) -> None:
        """Show what the user must know."""
        self._renderer.message(f"WARNING {message}", "yellow")

    async def refresh(self, settings: Settings) -> None:
        """Read `last` anew, once."""
        async with StatusReader(settings) as reader:
            self.last = await reader.read() or self.last

    async def follow(self, settings: Settings) -> None:
        """Show progress every second until cancelled; a target that cannot be read just now is asked again."""
        async with StatusReader(settings) as reader:
            while True:
                self._phase_changed.clear()
                began = time.monotonic()
                with suppress(LiveMigrationError):
                    status = await reader.read()
                    if status is not None:
                        self.last = status
                        self._renderer.progress(status)
                pause = max(_REFRESH_SECONDS, _SHARE * (time.monotonic() - began))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._phase_changed.wait(), pause)


class _PlainRenderer:
    """One line every few seconds, and one at once when the phase or the lag's state changes."""

    def __init__(self, console: Console, hint: str, plain_seconds: float) -> None:
        self._console = console
        self._hint = hint
        self._plain_seconds = plain_seconds
        self._shown_at = 0.0
        self._shown: tuple[Phase, LagState | None] | None = None

    def message(self, text: str, style: str) -> None:
        self._print(text)

    def progress(self, status: Status) -> None:
        line = progress_line(status)
        if line is None:
            return
        now = time.monotonic()
        state = (status.migration.phase, status.lag.state if status.lag else None)
        if state == self._shown and now - self._shown_at < self._plain_seconds:
            return
        is_news = state != self._shown
        self._shown, self._shown_at = state, now
        self._print(line)
        if is_news and self._hint and _awaits_cutover(status):
            self._print(self._hint)

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        now = datetime.now().astimezone().strftime("%H:%M:%S")
        self._console.print(Text(f"{now} {text}"), soft_wrap=True)


class _LiveRenderer:
    """Bars below the messages, drawn anew each second."""

    def __init__(self, console: Console, hint: str) -> None:
        self._hint = hint
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._is_started = False

    def message(self, text: str, style: str) -> None:
        now = datetime.now().astimezone().strftime("%H:%M:%S")
        self._live.console.print(Text.assemble((f"{now} ", "dim"), (text, style)), soft_wrap=True)

    def progress(self, status: Status) -> None:
        if not self._is_started:
            self._live.start()
            self._is_started = True
        self._live.update(render(status, self._hint), refresh=True)

    def close(self) -> None:
        if self._is_started:
            self._live.stop()
            self._is_started = False


def _awaits_cutover(status: Status) -> bool:
    return status.migration.phase is Phase.REPLAY and status.lag is not None and status.lag.is_caught_up


def render(status: Status, hint: str) -> RenderableType:
    """Give what a terminal shows: while copying a bar for each table, then the lag line."""
    phase = status.migration.phase
    lines: list[RenderableType] = []
    if phase is Phase.COPY:
        lines += [_bars(status), Text(copy_line(status))]
    elif phase in _REPLAYING:
        colour = {LagState.CAUGHT_UP: "green", LagState.FALLING_BEHIND: "yellow"}
        lines.append(Text(replay_line(status), style=colour.get(status.lag.state, "") if status.lag else ""))
        if hint and _awaits_cutover(status):
            lines.append(Text(hint, style="bold"))
    lines += [Text(f"{trouble.where}: {trouble.error}", style="red") for trouble in status.troubles[:5]]
    return Group(*lines)


def _bars(status: Status) -> Table:
    """Give a line for each table that is being copied, then those that wait, then those that are done."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=40)
    for _ in range(5):
        grid.add_column(justify="right", no_wrap=True)
    order = {"copying": 0, "stopped": 0, "planned": 1, "copied": 2, "ready": 3}
    tables = sorted(status.tables, key=lambda table: order.get(table.state, 0))
    for table in tables[:_TABLES_SHOWN]:
        grid.add_row(
            Text(table.name),
            ProgressBar(total=1.0, completed=table.fraction, width=24),
            Text(f"{table.fraction:4.0%}"),
            Text(f"{format_count(table.row_count)} rows"),
            Text(format_bytes(table.byte_count)),
            Text(_state_word(table), style="green" if table.is_copied else ""),
        )
    if len(tables) > _TABLES_SHOWN:
        grid.add_row(Text(f"… and {len(tables) - _TABLES_SHOWN} more tables"))
    return grid


def _state_word(table: TableProgress) -> str:
    return {"planned": "waits", "copied": "indexing", "ready": "done"}.get(table.state, table.state)
