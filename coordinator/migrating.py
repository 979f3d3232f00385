"""What surrounds the work of `migrate`, `clean` and the services: signals, keys, our own broker, what the state knows."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import click
from rich.console import Console

from live_migration.common import postgres, state
from live_migration.common.errors import LiveMigrationError
from live_migration.common.local_kafka import LocalKafka
from live_migration.common.settings import Settings, load_settings
from live_migration.common.state import Migration, Phase
from live_migration.common.tasks import TaskGroup
from live_migration.coordinator.clean import clean
from live_migration.coordinator.conductor import conduct
from live_migration.coordinator.display import Display, stop_hint
from live_migration.coordinator.handover import is_finished
from live_migration.coordinator.hypertable_candidates import Candidate
from live_migration.coordinator.hypertable_findings import propose_hypertables
from live_migration.coordinator.report import print_summary
from live_migration.coordinator.run import APPLICATION
from live_migration.coordinator.source_jobs import find_jobs_to_pause

_STOPPED = 130


async def migrate(settings: Settings, *, recopy: bool = False) -> int:
    """Run a migration to its end, or until a signal stops it with its state kept; give the exit code.

    With `recopy` every table is copied again, for slot or change log are lost.

    The first SIGINT or SIGTERM stops in order, the second at once; SIGUSR1, or c and ENTER, ask for the cutover.
    """
    stop, ask_cutover = asyncio.Event(), asyncio.Event()
    has_keys = sys.stdin is not None and sys.stdin.isatty()
    if has_keys and not settings.pause_source_jobs and not recopy:
        settings = await ask_to_pause_jobs(settings, sys.stdin.fileno())
    if not settings.hypertable and settings.hypertables_file is None and not recopy:
        settings = await ask_for_hypertables(settings, sys.stdin.fileno() if has_keys else None)
    async with Display(Console(stderr=True), stop_hint(has_keys=has_keys)) as display:
        async with _signals(stop, ask_cutover, display), _keys(ask_cutover if has_keys else None):
            async with _broker(settings, display.note) as reachable:
                await _conduct_with_display(reachable, display, stop, ask_cutover, recopy=recopy)
    if display.phase is Phase.DONE and not stop.is_set():
        return 0
    display.note("stopped; run the same command again to go on")
    return _STOPPED


async def _conduct_with_display(
    settings: Settings, display: Display, stop: asyncio.Event, ask_cutover: asyncio.Event, *, recopy: bool
) -> None:
    try:
        async with TaskGroup() as group:
            showing = group.create_task(display.follow(settings))
            await conduct(settings, stop=stop, ask_cutover=ask_cutover, observer=display, recopy=recopy)
            showing.cancel()
    except BaseExceptionGroup as failures:
        # The display swallows what the conductor reports better, so there is one cause.
        raise failures.exceptions[0] from failures
    if display.phase is Phase.DONE:
        await display.refresh(settings)
        if display.last is not None:
            print_summary(display.last, display.note)


@asynccontextmanager
async def _signals(stop: asyncio.Event, ask_cutover: asyncio.Event, display: Display) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def interrupted() -> None:
        if stop.is_set():
            display.warning("stopping at once")
            task.cancel()
        else:
            display.note("stopping, the state is kept; once more to stop at once")
            stop.set()

    def asked() -> None:
        display.note("cutover asked for by SIGUSR1")
        ask_cutover.set()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    loop.add_signal_handler(signal.SIGTERM, interrupted)
    loop.add_signal_handler(signal.SIGUSR1, asked)
    try:
        yield
    finally:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            loop.remove_signal_handler(each)


async def ask_to_pause_jobs(settings: Settings, terminal: int) -> Settings:
    """Ask whether jobs that stand in the way may be paused; without consent the conductor's checks refuse.

    `terminal`: its file number.
    """
    try:
        jobs = await find_jobs_to_pause(settings)
    except LiveMigrationError:
        return settings  # the conductor's checks name it
    if not jobs:
        return settings
    for job in jobs:
        click.echo(f"  {'moves data' if job.is_policy else 'may move data'}: {job}", err=True)
    click.echo("Pause these jobs of TimescaleDB on the source until `live-migration clean`? [y/N] ", nl=False, err=True)
    answer = await read_line(terminal)
    return settings.model_copy(update={"pause_source_jobs": answer.strip().lower() in ("y", "yes")})


async def ask_for_hypertables(settings: Settings, terminal: int | None) -> Settings:
    """Propose tables that would do well as hypertables, each to be taken or not; without a terminal name them, and take none.

    `terminal`: its file number.
    """
    try:
        candidates = await _find_candidates(settings)
    except LiveMigrationError:
        return settings  # the conductor's checks name it
    if not candidates:
        return settings
    if terminal is None:
        click.echo(
            "These tables would do well as hypertables; they come over as plain tables, for none is named:", err=True
        )
        for candidate in candidates:
            click.echo(f"  --hypertable '{candidate.spec}'  ({candidate})", err=True)
        return settings
    chosen = []
    for candidate in candidates:
        click.echo(f"Make {candidate} a hypertable on the target? [y/N] ", nl=False, err=True)
        if (await read_line(terminal)).strip().lower() in ("y", "yes"):
            chosen.append(str(candidate.spec))
    return settings.model_copy(update={"hypertable": tuple(chosen)})


async def _find_candidates(settings: Settings) -> list[Candidate]:
    async with (
        postgres.session(settings.source_uri(), "source", application=f"{APPLICATION} hypertables") as source,
        postgres.session(settings.target_uri(), "target", application=f"{APPLICATION} hypertables") as target,
    ):
        with postgres.asking("target", "reading the migration's state"):
            if await state.read_migration(target) is not None:
                return []
        with postgres.asking("source", "looking for tables that would do well as hypertables"):
            return await propose_hypertables(settings, source, target)


async def read_line(file: int) -> str:
    """Read a line from a terminal, by its file number, so that signals still get through; empty at its end."""
    loop = asyncio.get_running_loop()
    read: asyncio.Future[bytes] = loop.create_future()

    def typed() -> None:
        if not read.done():
            read.set_result(os.read(file, 1024))

    loop.add_reader(file, typed)
    try:
        return (await read).decode(errors="replace")
    finally:
        loop.remove_reader(file)


@asynccontextmanager
async def _keys(ask_cutover: asyncio.Event | None) -> AsyncIterator[None]:
    """Watch the terminal for `c` and ENTER."""
    if ask_cutover is None:
        yield
        return
    loop = asyncio.get_running_loop()
    terminal = sys.stdin.fileno()

    def typed() -> None:
        line = os.read(terminal, 1024)
        if not line:
            loop.remove_reader(terminal)
        elif line.strip().lower() == b"c":
            ask_cutover.set()

    loop.add_reader(terminal, typed)
    try:
        yield
    finally:
        loop.remove_reader(terminal)


@asynccontextmanager
async def _broker(settings: Settings, note: Callable[[str], None]) -> AsyncIterator[Settings]:
    """Give settings with a broker: the one that is given, the one that the migration has, else one of our own in `dir`."""
    folder = settings.dir / "kafka"
    if settings.kafka is None:
        migration, is_over = await _look_up(settings)
        if migration is not None and (is_over or not folder.exists()):
            settings = settings.model_copy(update={"kafka": migration.kafka})
    if settings.kafka is not None:
        yield settings
        return
    note(f"starting a broker of our own in {folder}")
    async with LocalKafka(folder, flush_each_append=True) as broker:
        yield settings.model_copy(update={"kafka": broker.bootstrap})


async def _look_up(settings: Settings) -> tuple[Migration | None, bool]:
    """Give the migration that the target holds, and whether nothing is left to do for it."""
    try:
        async with postgres.session(settings.target_uri(), "target") as target:
            with postgres.asking("target", "reading the migration's state"):
                migration = await state.read_migration(target)
                is_over = migration is not None and migration.phase is Phase.DONE and await is_finished(target)
                return migration, is_over
    except LiveMigrationError:
        return None, False  # the conductor's checks name it, and whatever else is wrong


async def adopt_from_state(settings: Settings) -> Settings:
    """Fill what was not given from the state on the target, where one is given."""
    if settings.target is None:
        return settings
    async with postgres.session(settings.target_uri(), "target") as target:
        with postgres.asking("target", "reading the migration's state"):
            migration = await state.read_migration(target)
    return adopt(settings, migration) if migration else settings


def adopt(settings: Settings, migration: Migration) -> Settings:
    """Fill settings that were not given from those that the migration runs with; the target's state names it."""
    known = {name: value for name, value in migration.settings.items() if name in type(settings).model_fields}
    known |= {"name": migration.name, "kafka": migration.kafka, "partitions": migration.lane_map.shared}
    unset = {name: value for name, value in known.items() if name not in settings.model_fields_set}
    return load_settings({**settings.model_dump(exclude_unset=True), **unset})


async def clean_up(settings: Settings, *, prune: bool, force: bool = False) -> None:
    """Run `clean` with what the state knows, and with our own broker where its folder is."""

    def note(message: str) -> None:
        click.echo(message, err=True)

    was_given = settings.kafka is not None
    adopted = await adopt_from_state(settings)
    folder = adopted.dir / "kafka"
    if was_given or prune or not (folder / "server.properties").exists():
        kept = adopted if was_given else adopted.model_copy(update={"kafka": None})
        is_known = await clean(kept, prune=prune, note=note, force=force)
    else:
        async with LocalKafka(folder, flush_each_append=True) as broker:
            reachable = adopted.model_copy(update={"kafka": broker.bootstrap})
            is_known = await clean(reachable, prune=prune, note=note, force=force)
    if is_known:
        note("nothing of this migration is left on source and target")


async def serve(run: Callable[[Settings, asyncio.Event], Awaitable[None]], settings: Settings) -> None:
    """Run a service until it ends or SIGTERM or SIGINT tells it to drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop.set)
    await run(settings, stop)
