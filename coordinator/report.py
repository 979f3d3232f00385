"""Findings, status and verification for people, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from live_migration.common.progress import format_bytes, format_count, format_duration, format_number_of
from live_migration.coordinator.display import progress_line, render
from live_migration.coordinator.findings import Finding
from live_migration.coordinator.skip import describe_skips
from live_migration.coordinator.status import Status
from live_migration.coordinator.verify import Report, Result, Verdict

_STALE_SECONDS = 30.0


def print_findings(findings: Sequence[Finding]) -> None:
    """Print what validation found, each with what to do next, and the outcome last."""
    for finding in findings:
        click.echo(f"{finding.level}: {finding.what}" + (f"\n  next: {finding.hint}" if finding.hint else ""), err=True)
    errors = sum(finding.level == "error" for finding in findings)
    warnings = len(findings) - errors
    if errors:
        click.echo(
            f"{format_number_of(errors, 'error')}, {format_number_of(warnings, 'warning')}: mend the errors, then validate again",
            err=True,
        )
    else:
        click.echo(f"ready to migrate ({format_number_of(warnings, 'warning')})", err=True)


def print_result(result: Result) -> None:
    """Print one comparison."""
    rows = ""
    if result.source_rows is not None and result.target_rows is not None:
        rows = f", {format_count(result.source_rows)} rows"
        if result.source_rows != result.target_rows:
            rows = f", {format_count(result.source_rows)} rows on source, {format_count(result.target_rows)} on target"
    detail = f": {result.detail}" if result.detail else ""
    click.echo(f"{result.kind} {result.name}: {result.verdict.value}{rows}{detail}", err=True)


def print_verification(report: Report) -> None:
    """Print the outcome of a verification."""
    for line in describe_skips(report.skips):
        click.echo(line, err=True)
    equal = sum(result.verdict is Verdict.EQUAL for result in report.results)
    rows = sum(result.source_rows or 0 for result in report.results if result.kind == "table")
    spent = format_duration(report.seconds)
    if report.is_equal:
        click.echo(f"source and target are equal: {equal} objects, {format_count(rows)} rows, in {spent}", err=True)
        return
    names = ", ".join(f"{result.kind} {result.name}" for result in report.differences[:10])
    click.echo(
        f"source and target differ in {len(report.differences)} of {len(report.results)} objects: {names}\n"
        "  next: while somebody writes to the source, or before the cutover, differences are to be expected; else see docs/",
        err=True,
    )


def print_summary(status: Status, note: Callable[[str], None]) -> None:
    """Tell what a migration did."""
    totals = status.totals
    spent = (datetime.now(UTC) - status.migration.created_at).total_seconds()
    note(
        f"{format_count(totals.row_count)} rows of {totals.tables} tables copied, {format_count(status.change_count)} changes "
        f"replayed, {format_duration(spent)} since the beginning"
    )
    for line in describe_skips(status.skips):
        note(line)


def print_status(status: Status, console: Console) -> None:
    """Print a migration's status."""
    migration = status.migration
    running = (
        f"run by {status.coordinator}"
        if status.coordinator
        else "not running: `live-migration migrate` goes on with it"
    )
    console.print(Text(f"migration {migration.name} of {migration.source_address}, {running}"), soft_wrap=True)
    since = format_duration(round((datetime.now(UTC) - migration.phase_at).total_seconds()))
    console.print(Text(f"phase {migration.phase.value} since {since}"), soft_wrap=True)
    if progress_line(status) is not None:
        console.print(render(status, "To stop replication, run `live-migration cutover`"), soft_wrap=True)
    else:
        totals = status.totals
        console.print(
            Text(
                f"{totals.tables_copied} of {totals.tables} tables copied, {format_count(totals.row_count)} rows, "
                f"{format_count(status.change_count)} changes applied"
            ),
            soft_wrap=True,
        )
    behind = [str(lane.lane) for lane in status.lanes if lane.is_behind]
    if status.lanes:
        console.print(Text(f"{len(status.lanes)} lanes, behind the log: {', '.join(behind) or 'none'}"), soft_wrap=True)
    console.print(_workers(status))
    for line in describe_skips(status.skips):
        console.print(Text(line, style="yellow"), soft_wrap=True)
    for trouble in status.troubles:
        hint = f"\n  next: {trouble.hint}" if trouble.hint else ""
        console.print(Text(f"{trouble.where}: {trouble.error}{hint}", style="red"), soft_wrap=True)


def _workers(status: Status) -> Table:
    grid = Table.grid(padding=(0, 2))
    now = datetime.now(UTC).timestamp()
    seen = [(worker.kind, worker.id, worker.seen_seconds_ago, worker.rss_bytes) for worker in status.workers]
    if status.producer and not any(kind == "producer" for kind, *_ in seen):
        producer = status.producer
        seen.insert(0, ("producer", producer.worker, now - producer.seen_at, producer.rss_bytes))
    for kind, name, seconds, rss_bytes in seen:
        state = "alive" if seconds < _STALE_SECONDS else f"not seen for {format_duration(round(seconds))}"
        grid.add_row(Text(kind), Text(name), Text(state), Text(format_bytes(rss_bytes)))
    return grid
