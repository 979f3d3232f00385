"""What `validate` finds where hypertables are made anew: those that the user asks for, and those of another version of TimescaleDB."""

from __future__ import annotations

import asyncpg

from live_migration.common.postgres import set_lock_timeout
from live_migration.common.progress import format_bytes
from live_migration.common.settings import Settings
from live_migration.common.timescale import parse_version, read_version, read_version_to_be
from live_migration.coordinator.findings import Finding, error, warning
from live_migration.coordinator.flat_entries import read_flat_entries
from live_migration.coordinator.flat_findings import assess_flat
from live_migration.coordinator.hypertable_candidates import Candidate, propose, read_memory
from live_migration.coordinator.hypertable_checks import assess_specs
from live_migration.coordinator.hypertable_gaps import assess_definitions, read_absent, read_target
from live_migration.coordinator.hypertable_skips import read_skips
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.hypertable_spec import read_specs
from live_migration.coordinator.hypertable_sql import Target
from live_migration.coordinator.hypertable_tables import Table, read_tables

_DECOMPRESSED = """
    select coalesce(sum(uncompressed_heap_size + uncompressed_toast_size + uncompressed_index_size), 0)::bigint
    from _timescaledb_catalog.compression_chunk_size
"""


async def find_hypertables(settings: Settings, source: asyncpg.Connection, target: asyncpg.Connection) -> list[Finding]:
    """Judge the hypertables that would be made on the target; nothing where chunks come over as they are.

    Raises:
        UsageError: what the user says of hypertables cannot be read.
    """
    specs, skips = read_specs(settings.hypertable, settings.hypertables_file), read_skips(settings)
    version = await read_version(source)
    found = [_nothing_to_skip()] if skips.named and not specs else []
    if version is not None:
        found += await (_find_flat(source) if settings.flatten else _find_gaps(version, source, target))
        if specs:
            found.append(
                error(
                    "hypertables are asked for, but the source has TimescaleDB itself",
                    "Leave out --hypertable and --hypertables-file; make more hypertables on the target after the cutover.",
                )
            )
        return found
    if not specs:
        return found
    to_be = await read_version_to_be(target, "")
    return assess_specs(
        specs,
        await _read_tables(settings, source),
        parse_version(to_be) if to_be else None,
        skips=skips,
        memory_bytes=await read_memory(target),
    )


def _nothing_to_skip() -> Finding:
    return error(
        "--skip-hypertable-object is given, and no table is to become a hypertable",
        "Name tables with --hypertable or --hypertables-file, or leave it out.",
    )


async def _find_flat(source: asyncpg.Connection) -> list[Finding]:
    async with source.transaction(isolation="repeatable_read", readonly=True):
        definitions, entries = await read_definitions(source), await read_flat_entries(source)
        decompressed_bytes: int = await source.fetchval(_DECOMPRESSED)
    return assess_flat(definitions, entries, decompressed_bytes) if definitions else []


async def _find_gaps(version: str, source: asyncpg.Connection, target: asyncpg.Connection) -> list[Finding]:
    to_be = await read_version_to_be(target, version)
    if to_be in (None, version):
        return []
    async with source.transaction(isolation="repeatable_read", readonly=True):
        definitions = await read_definitions(source)
        decompressed_bytes: int = await source.fetchval(_DECOMPRESSED)
    if definitions is None or to_be is None:
        return []
    server = await read_target(target)
    absent = await read_absent(target, definitions, own_only=True) if server else frozenset()
    found = assess_definitions(definitions, server or Target(parse_version(to_be), definitions.schema), absent)
    if decompressed_bytes:
        found.append(
            warning(
                "compressed chunks are decompressed on their way, and compressed on the target after the hand-over: until then they take "
                f"about {format_bytes(decompressed_bytes)} there",
                "See that the target's disk has room for that.",
            )
        )
    return found


async def propose_hypertables(
    settings: Settings, source: asyncpg.Connection, target: asyncpg.Connection
) -> list[Candidate]:
    """Give tables of a plain source that would do well as hypertables; none where the target cannot have any."""
    if await read_version(source) is not None:
        return []
    to_be = await read_version_to_be(target, "")
    if to_be is None:
        return []
    return propose(await _read_tables(settings, source), parse_version(to_be), await read_memory(target))


async def _read_tables(settings: Settings, source: asyncpg.Connection) -> tuple[Table, ...]:
    async with source.transaction(readonly=True):
        await source.execute(set_lock_timeout(settings.lock_timeout))
        return await read_tables(source)
