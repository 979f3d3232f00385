"""The commands. Words for people go to stderr, `--json` and `tail` to stdout; exit codes: 0 done, 1 failed, 2 usage, 130 stopped."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import click
import orjson
import uvloop
from rich.console import Console

from live_migration.common.errors import LiveMigrationError, TargetError, UsageError
from live_migration.common.memory import keep_collected
from live_migration.common.settings import Settings, load_settings
from live_migration.common.telemetry import configure_logging
from live_migration.coordinator import migrating, report
from live_migration.coordinator.cutover import request_cutover
from live_migration.coordinator.dead_letters import read_letters
from live_migration.coordinator.demo import run_demo
from live_migration.coordinator.options import CONDUCTOR, CONSUMER, HYPERTABLES, KAFKA, LOG, PRODUCER, settings_options
from live_migration.coordinator.preflight import validate
from live_migration.coordinator.skip import parse_position, request_skip
from live_migration.coordinator.status import StatusReader
from live_migration.coordinator.tail import tail
from live_migration.coordinator.verify import verify

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 130


def run(arguments: Sequence[str]) -> int:
    """Run a command and give its exit code; what goes wrong is said on stderr, the next step last.

    An error that nobody expected leaves as it is: Python prints where it came from, and the exit code is 1.
    """
    try:
        result = commands.main(list(arguments), prog_name="live-migration", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return EXIT_STOPPED
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_STOPPED
    except LiveMigrationError as error:
        return _fail(error)
    except BaseExceptionGroup as group:
        if (told := _our_error(group)) is not None:
            return _fail(told)
        raise
    except BrokenPipeError:  # of `tail | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        return _fail(_local(error))


def _fail(error: LiveMigrationError) -> int:
    click.echo(f"error: {error.message}" + (f"\n  next: {error.hint}" if error.hint else ""), err=True)
    return error.exit_code


def _our_error(group: BaseExceptionGroup[BaseException]) -> LiveMigrationError | None:
    """Give the first error of ours, or of this machine, in a group in which there are no others."""
    mine, others = group.split((LiveMigrationError, OSError))
    if mine is None or others is not None:
        return None
    first: BaseException = mine
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, OSError):
        return _local(first)
    return first if isinstance(first, LiveMigrationError) else None


def _local(error: OSError) -> LiveMigrationError:
    """Put what this machine refuses (a full disk, a folder that may not be written) into our words."""
    return LiveMigrationError(
        f"this machine: {error}", hint="See to the folder (--dir) or the disk, then run the command again."
    )


def _load(options: dict[str, Any], default_log_level: str = "warning") -> Settings:
    settings = load_settings(options)
    level = settings.log_level if "log_level" in settings.model_fields_set else default_log_level
    configure_logging(level, json=settings.log_json)
    if default_log_level == "warning":
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # the command says itself what cannot be reached
    return settings


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command that ctrl-C or SIGTERM ends at once, with its connections and children."""

    async def stoppable() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        collecting = asyncio.create_task(keep_collected())
        try:
            return await work
        finally:
            collecting.cancel()

    try:
        return uvloop.run(stoppable())
    except asyncio.CancelledError:
        raise click.Abort from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("live-migration"), "-v", "--version")
def commands() -> None:
    """Move a running PostgreSQL database to another server, with a few minutes of downtime.

    Every option can come from the environment, URIs and passwords best so. Exit codes: 0 done, 1 failed, 2 wrong usage,
    130 stopped with its state kept.
    """


@commands.command("validate")
@settings_options(
    "source",
    "target",
    *KAFKA,
    "name",
    "pg_bin",
    "replica_identity_full",
    *HYPERTABLES,
    "pause_source_jobs",
    "flatten",
    "partitions",
    "lanes",
    "replication_factor",
    *LOG,
)
def validate_command(**options: Any) -> int:
    """Check everything that a migration needs, and touch nothing."""
    settings = _load(options)
    findings = _run(validate(settings))
    report.print_findings(findings)
    return EXIT_FAILED if any(finding.level == "error" for finding in findings) else 0


@commands.command("migrate")
@settings_options("source", "target", *KAFKA, "name", *CONDUCTOR, *PRODUCER, *CONSUMER, *LOG)
@click.option(
    "--recopy",
    is_flag=True,
    help="Make a lost slot or change log anew and copy every table again; refused when nothing is lost.",
)
def migrate_command(recopy: bool, **options: Any) -> int:
    """Run the whole migration, or go on with it."""
    settings = _load(options)
    settings.source_uri()
    settings.target_uri()
    return _run(migrating.migrate(settings, recopy=recopy))


@commands.command("status")
@settings_options("source", "target", *KAFKA, *LOG)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def status_command(as_json: bool, **options: Any) -> int:
    """Show phase, progress, lag, rates, workers and troubles, from any terminal."""
    settings = _load(options)

    async def work() -> int:
        adopted = await migrating.adopt_from_state(settings)
        async with StatusReader(adopted, least_seconds=1.0) as reader:
            status = await reader.read_with_rates(seconds=2.0)
        if status is None:
            raise TargetError(
                "the target holds no migration", hint="`live-migration migrate` starts one; check TARGET."
            )
        if as_json:
            _write_json(status.as_dict())
        else:
            report.print_status(status, Console(stderr=True))
        return 0

    return _run(work())


@commands.command("cutover")
@settings_options("target", *LOG)
def cutover_command(**options: Any) -> int:
    """Ask the running `migrate` to cut over, once nobody writes to the source any more."""
    settings = _load(options)
    settings.target_uri()
    click.echo(_run(request_cutover(settings)), err=True)
    return 0


@commands.command("skip")
@settings_options("target", *LOG)
@click.option("--lane", type=click.IntRange(0), required=True, help="The lane that is stopped.")
@click.option("--position", required=True, help="Where it is stopped, as its error says: X/Y#n.")
def skip_command(lane: int, position: str, **options: Any) -> int:
    """Give up the one change that stops a lane: its row goes to the dead letter topic, and the lane goes on."""
    settings = _load(options)
    settings.target_uri()
    click.echo(_run(request_skip(settings, lane, parse_position(position))), err=True)
    return 0


@commands.command("verify")
@settings_options("source", "target", "lock_timeout", *LOG)
@click.option("--jobs", type=click.IntRange(1, 64), default=4, show_default=True, help="Tables compared at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def verify_command(jobs: int, as_json: bool, **options: Any) -> int:
    """Compare source and target, row by row on the servers; exit code 1 on a difference."""
    settings = _load(options)
    settings.source_uri()
    settings.target_uri()
    found = _run(verify(settings, jobs=jobs, observe=report.print_result))
    report.print_verification(found)
    if as_json:
        _write_json(found.as_dict())
    return 0 if found.is_equal else EXIT_FAILED


@commands.command("clean")
@settings_options("source", "target", *KAFKA, "name", "dir", "lock_timeout", *LOG)
@click.option("--prune", is_flag=True, help="Remove the folder of our own broker and of logs, too.")
@click.option(
    "--force",
    is_flag=True,
    help="Also what no state on the target names, without a source that is off, and with work left on the target.",
)
def clean_command(prune: bool, force: bool, **options: Any) -> int:
    """Drop slot, publications, topics and state, and give back what was changed on the source."""
    settings = _load(options)
    settings.source_uri()
    settings.target_uri()
    _run(migrating.clean_up(settings, prune=prune, force=force))
    return 0


@commands.command("producer")
@settings_options("source", *KAFKA, "name", *PRODUCER, *LOG)
def producer_command(**options: Any) -> int:
    """Run the service that reads the source's WAL into Kafka."""
    settings = _load(options, "info")
    settings.source_uri()
    settings.kafka_servers()
    from live_migration.producer.service import run_producer  # here, for the others do without NumPy's memory

    _run(migrating.serve(run_producer, settings))
    return 0


@commands.command("consumer")
@settings_options("source", "target", *KAFKA, "name", "part_size", *CONSUMER, *LOG)
def consumer_command(**options: Any) -> int:
    """Run the service that copies tables and applies changes to the target; as many as you like."""
    settings = _load(options, "info")
    settings.source_uri()
    settings.target_uri()
    settings.kafka_servers()
    from live_migration.consumer.service import run_consumer  # as above

    _run(migrating.serve(run_consumer, settings))
    return 0


@commands.command("tail")
@settings_options("target", *KAFKA, "name", *LOG)
@click.option("--table", help="Only changes of this table, schema.name.")
@click.option(
    "--from-beginning", is_flag=True, help="Begin with the oldest change that is kept, not with what comes now."
)
@click.option("--limit", type=click.IntRange(1), help="End after so many changes.")
@click.option("--dead-letters", is_flag=True, help="Print the changes that were skipped instead, all that are there.")
def tail_command(table: str | None, from_beginning: bool, limit: int | None, dead_letters: bool, **options: Any) -> int:
    """Print the change log as JSON lines."""
    settings = _load(options)
    if settings.kafka is None and settings.target is None:
        raise UsageError(
            "neither a broker nor a target is given", hint="Give --kafka HOST:PORT, or --target to look it up."
        )

    async def work() -> int:
        adopted = await migrating.adopt_from_state(settings)
        if dead_letters:
            lines = read_letters(adopted, table=table, limit=limit)
        else:
            lines = tail(adopted, table=table, from_beginning=from_beginning, limit=limit)
        async for line in lines:
            sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()
        return 0

    return _run(work())


@commands.command("demo")
@click.option(
    "--rows", type=click.IntRange(1_000), default=1_000_000, show_default=True, help="Rows to begin with, about."
)
@click.option(
    "--seconds", type=click.IntRange(0), default=20, show_default=True, help="Time that replay goes on under load."
)
def demo_command(rows: int, seconds: int) -> int:
    """Start two servers, a broker and a writer under load, and migrate from one to the other."""
    configure_logging("warning")
    return 0 if _run(run_demo(rows=rows, seconds=seconds)) else EXIT_FAILED


def _write_json(value: object) -> None:
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")
    sys.stdout.buffer.flush()
