"""Hypertables and aggregates on the target, made anew, or plain tables in their place: each step's progress is committed with what it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from live_migration.common.errors import TargetError
from live_migration.common.postgres import asking
from live_migration.common.relation import QualifiedName, quote_identifier, quote_literal
from live_migration.common.timescale import read_layout, read_version
from live_migration.coordinator import steps
from live_migration.coordinator.dump_script import Entry
from live_migration.coordinator.entries import run_entries
from live_migration.coordinator.hypertable_definitions import Definitions
from live_migration.coordinator.hypertable_entries import part_entries
from live_migration.coordinator.hypertable_gaps import read_target
from live_migration.coordinator.hypertable_sql import (
    Target,
    aggregate_index_statements,
    aggregate_statements,
    compression_statements,
    hypertable_statements,
)
from live_migration.coordinator.made_definitions import Made
from live_migration.coordinator.run import Run

_NAMES_STEP = "names of materializations"

_CHUNKS = """
    select oid, root_schema, root_name from _live_migration.tables where kind = 'chunk' and oid = any($1::oid[]) order by oid
"""
_ADOPT = """
    update _live_migration.tables t set root_schema = $3, root_name = $4
    from _live_migration.tables r
    where r.kind = 'hypertable' and r.schema_name = $1 and r.table_name = $2 and r.oid in (t.oid, t.hypertable_oid)
"""


async def make_schema(run: Run, made: Made, entries: Sequence[Entry], *, step: str) -> None:
    """Run a schema's first part with hypertables and aggregates in its midst; `step` names the progress of what comes before them.

    Goes on where an earlier call got to.

    Raises:
        TargetError: names what cannot be made.
    """
    before, after = part_entries(entries, made.entries)
    if made.is_flat:
        await run_entries(run, step, [*before, *after])
        return
    target = await _make_extension(run, made.definitions)
    await run_entries(run, step, before)
    await run_entries(run, "hypertables", hypertable_entries(made.definitions, target))
    await run_entries(run, "aggregates", aggregate_entries(made.definitions, target))
    await run_entries(run, f"{step} after aggregates", after)
    await _adopt_names(run, made)
    await run_entries(run, "chunks", await chunk_entries(run, made.slices))


async def _make_extension(run: Run, definitions: Definitions) -> Target:
    """Make the extension in its default version, where it is not there."""
    # In a session of its own: the extension must be made before anything of it is loaded.
    async with run.target_session("timescaledb") as session:
        if await read_version(session) is None:
            with asking("target", "making extension timescaledb"):
                schema = quote_identifier(definitions.schema)
                await session.execute(f"create schema if not exists {schema}")
                await session.execute(f"create extension timescaledb with schema {schema}")
    with asking("target", "looking for TimescaleDB"):
        target = await read_target(run.target)
    if target is None:
        raise TargetError("the target has no TimescaleDB any more", hint="`create extension timescaledb` there.")
    return target


def hypertable_entries(definitions: Definitions, target: Target) -> list[Entry]:
    """Give what makes tables hypertables, as entries."""
    return [
        _entry("HYPERTABLE", each.name, hypertable_statements(each, target) + compression_statements(each, target))
        for each in definitions.hypertables
    ]


def aggregate_entries(definitions: Definitions, target: Target) -> list[Entry]:
    """Give what makes continuous aggregates, without rows, as entries."""
    return [
        _entry(
            "CONTINUOUS AGGREGATE",
            each.name,
            aggregate_statements(each, target) + aggregate_index_statements(each),
        )
        for each in definitions.aggregates
    ]


def _entry(kind: str, name: QualifiedName, statements: Sequence[str]) -> Entry:
    return Entry(0, 0, name.name, kind, name.schema, ";\n".join(statements))


async def _adopt_names(run: Run, made: Made) -> None:
    """Send the rows of aggregates to the hypertables that hold them on the target, which have other names there."""
    if await steps.is_done(run.target, _NAMES_STEP):
        return
    with asking("target", "reading the hypertables"):
        layout = await read_layout(run.target)
    theirs = {each.view: each.name for each in layout.hypertables.values() if each.view} if layout else {}
    async with run.target_transaction("naming the aggregates' hypertables") as target:
        for here, view in made.materializations.items():
            there = theirs[view]
            await target.execute(_ADOPT, here.schema, here.name, there.schema, there.name)
        await steps.finish(target, run.epoch, _NAMES_STEP)


async def chunk_entries(run: Run, slices: Mapping[int, str]) -> list[Entry]:
    """Give what makes the chunks that are to be copied, with the source's bounds, so that no two copies wait for one another to make them.

    `slices`: the bounds, by the chunks' oids on the source.
    """
    with asking("target", "reading the plan"):
        rows = await run.target.fetch(_CHUNKS, list(slices))
    return [
        Entry(
            0,
            0,
            row["root_name"],
            "CHUNK OF",
            row["root_schema"],
            "select 1 from _timescaledb_functions.create_chunk("
            f"{quote_literal(QualifiedName(row['root_schema'], row['root_name']).sql)}::regclass, {quote_literal(slices[row['oid']])})",
        )
        for row in rows
    ]
