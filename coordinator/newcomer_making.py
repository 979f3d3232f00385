"""One newcomer's table, hypertable or continuous aggregate on the target, empty, with its indexes: in one transaction with its row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import asyncpg

from live_migration.common.catalog import TableInfo
from live_migration.common.errors import TargetError
from live_migration.common.hashing import read_encoding
from live_migration.common.postgres import asking
from live_migration.common.relation import QualifiedName
from live_migration.coordinator import client_programs, planning, steps
from live_migration.coordinator.client_programs import ClientPrograms, ProgramError
from live_migration.coordinator.dump_script import Entry, parse_script
from live_migration.coordinator.flat_entries import read_flat_entries
from live_migration.coordinator.hash_dimensions import HashDimension, assess_hash_dimensions, read_hash_dimensions
from live_migration.coordinator.hypertable_definitions import Definitions, Hypertable
from live_migration.coordinator.hypertable_entries import EntriesOfTimescale, read_entries_of_timescale, without_only
from live_migration.coordinator.hypertable_gaps import read_target
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.hypertable_sql import (
    Target,
    aggregate_index_statements,
    aggregate_statements,
    compression_statements,
    hypertable_statements,
)
from live_migration.coordinator.planning import Moment
from live_migration.coordinator.run import Run
from live_migration.coordinator.schema import FOREIGN_KEYS, dump, plan_foreign_keys, private_folder

Kind = Literal["table", "hypertable", "aggregate"]

REASON = "it was made on the source after the plan"
_LATE = frozenset({"TRIGGER", "RULE", "POLICY", "ROW SECURITY"})
_LATE_COMMENTS = ("CONSTRAINT ", "TRIGGER ", "RULE ", "POLICY ")
_NOWHERE = Moment("", 0, 0, None)

_MATERIALIZATION = """
    select materialization_hypertable_schema::text as schema, materialization_hypertable_name::text as name
    from timescaledb_information.continuous_aggregates where view_schema = $1 and view_name = $2
"""
_MADE = """
    update _live_migration.tables
    set state = 'ready', newcomer = 'made', rebuild = $2, snapshot = null, horizon = null, timeline = null, root_schema = $3, root_name = $4,
        made_oid = to_regclass($5)
    where oid = $1
"""


class NewcomerRefused(Exception):
    """A newcomer cannot be made on the target as things are; says why, and what can be done."""


@dataclass(frozen=True, slots=True)
class Newcomer:
    """What was made on the source after the plan. `table`: that which holds its rows; `name`: what people know it by."""

    table: TableInfo
    kind: Kind
    name: QualifiedName


@dataclass(frozen=True, slots=True)
class Blueprint:
    """All that makes a newcomer, as one snapshot of the source showed it. `entries`: pg_dump's; an aggregate has none.

    `is_flat`: a hypertable becomes a plain table. `dimensions`: of one that is cut by a hash; `encoding`: the source's.
    """

    pre_data: Sequence[Entry]
    post_data: Sequence[Entry]
    definitions: Definitions | None
    keys: EntriesOfTimescale
    foreign_keys: Sequence[asyncpg.Record]
    is_flat: bool = False
    dimensions: Sequence[HashDimension] = ()
    encoding: str = ""

    def at_once(self, section: Sequence[Entry]) -> list[Entry]:
        """Give the entries to be run while lanes apply."""
        return [each for each in self._own(section) if each.type != "FK CONSTRAINT" and not _is_late(each)]

    @property
    def late(self) -> list[Entry]:
        """What may not be there while lanes apply."""
        return [each for each in self._own([*self.pre_data, *self.post_data]) if _is_late(each)]

    def _own(self, entries: Sequence[Entry]) -> list[Entry]:
        return [each for each in self.keys.to_run(entries) if each.statements]


def _is_late(entry: Entry) -> bool:
    return entry.type in _LATE or (entry.type == "COMMENT" and entry.name.startswith(_LATE_COMMENTS))


async def make_newcomer(
    run: Run,
    programs: ClientPrograms,
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    newcomer: Newcomer,
    *,
    is_flat: bool = False,
) -> bool:
    """Make a newcomer on the target and record it as `made`; False where it is gone from the source.

    `is_flat`: a hypertable becomes a plain table.

    Raises:
        NewcomerRefused: the target cannot have it.
    """
    _require_carried(run, newcomer)
    blueprint = await _draw(run, programs, source, newcomer, is_flat=is_flat)
    if blueprint is None:
        return False
    try:
        with asking("target", f"making {newcomer.name}"):
            async with target.transaction():
                await _make(run, target, newcomer, blueprint)
                await steps.require_role(target, run.epoch)
    except TargetError as error:
        if not isinstance(error.__cause__, asyncpg.PostgresError):
            raise
        raise NewcomerRefused(
            f"{error.message}. Make what is missing on the target, and it is tried again by itself; or drop {newcomer.name}"
        ) from error
    return True


def _require_carried(run: Run, newcomer: Newcomer) -> None:
    """Refuse what the stream cannot carry: its form was chosen for the tables of the plan."""
    if run.migration.binary_stream and not newcomer.table.is_binary_safe:
        types = sorted({column.type for column in newcomer.table.copied_columns if not column.is_binary_safe})
        raise NewcomerRefused(
            f"the stream is in binary form, as the plan's tables allowed, and cannot carry {', '.join(types)}. Drop {newcomer.name} and make "
            "it again after the migration, or `clean` and start again"
        )


async def leave_out(run: Run, target: asyncpg.Connection, newcomer: Newcomer) -> None:
    """Record an aggregate that the target cannot have: its lane passes its changes over, and the cutover does not mind it."""
    with asking("target", f"leaving {newcomer.name} out"):
        async with target.transaction():
            await _insert_row(run, target, newcomer.table, is_left_out=True)
            await target.execute("update _live_migration.tables set state = 'ready' where oid = $1", newcomer.table.oid)
            await steps.require_role(target, run.epoch)
    run.reporter.warning(
        f"continuous aggregate {newcomer.name}, made on the source, is left out: the target has plain tables alone"
    )


async def _insert_row(run: Run, target: asyncpg.Connection, table: TableInfo, *, is_left_out: bool = False) -> None:
    plan = planning.table_row(table, run.migration.lane_map, "insert", {}, _NOWHERE, is_left_out=is_left_out)
    columns = ", ".join(planning.TABLE_COLUMNS)
    places = ", ".join(f"${n}" for n in range(1, len(planning.TABLE_COLUMNS) + 1))
    await target.execute(f"insert into _live_migration.tables ({columns}) values ({places})", *plan)


async def _draw(
    run: Run, programs: ClientPrograms, source: asyncpg.Connection, newcomer: Newcomer, *, is_flat: bool
) -> Blueprint | None:
    """Read all that makes a newcomer in one snapshot; None where that does not show it any more."""

    async def look() -> Blueprint | None:
        async with source.transaction(isolation="repeatable_read", readonly=True):
            snapshot = await source.fetchval("select pg_export_snapshot()")
            if not await source.fetchval("select exists (select from pg_class where oid = $1)", newcomer.table.oid):
                return None
            definitions = await read_definitions(source)
            keys = (await read_flat_entries(source)).entries if is_flat else await read_entries_of_timescale(source)
            foreign_keys = [row for row in await source.fetch(FOREIGN_KEYS) if row["table_oid"] == newcomer.table.oid]
            dimensions = await read_hash_dimensions(source) if newcomer.kind == "hypertable" else []
            dimensions = [each for each in dimensions if each.hypertable == newcomer.name]
            encoding = await read_encoding(source)
            pre_data, post_data = await _dump(run, programs, snapshot, newcomer)
        return Blueprint(pre_data, post_data, definitions, keys, foreign_keys, is_flat, dimensions, encoding)

    return await run.patiently(f"reading {newcomer.name}", look)


async def _dump(
    run: Run, programs: ClientPrograms, snapshot: str, newcomer: Newcomer
) -> tuple[list[Entry], list[Entry]]:
    if newcomer.kind == "aggregate":
        return [], []
    with private_folder(run.settings) as folder:
        archive = Path(folder, "newcomer.dump")
        try:
            await dump(run, programs, archive, snapshot, table=newcomer.name)
        except ProgramError as error:
            raise NewcomerRefused(f"{error.message}. It is tried again by itself") from error
        pre_data = await client_programs.write_script(programs, archive, section="pre-data")
        post_data = await client_programs.write_script(programs, archive, section="post-data")
    return [each for each in parse_script(pre_data) if each.type not in ("SCHEMA", "EXTENSION")], [
        each for each in parse_script(post_data) if not each.type.startswith("PUBLICATION")
    ]


async def _make(run: Run, target: asyncpg.Connection, newcomer: Newcomer, blueprint: Blueprint) -> None:
    await target.execute("set local check_function_bodies = off; set local client_min_messages = warning")
    table = newcomer.table
    root = table.name
    if newcomer.kind == "aggregate":
        await _make_aggregate(target, newcomer, blueprint)
        row = await target.fetchrow(_MATERIALIZATION, newcomer.name.schema, newcomer.name.name)
        root = QualifiedName(row["schema"], row["name"])
    else:
        await _make_table(target, newcomer, blueprint)
    await _insert_row(run, target, table)
    names = (root.schema, root.name) if newcomer.kind != "table" else (None, None)
    await target.execute(_MADE, table.oid, REASON, *names, root.sql)
    await target.executemany(
        """insert into _live_migration.foreign_keys (oid, schema_name, table_name, name, is_partitioned, is_valid, statement)
           values ($1, $2, $3, $4, $5, $6, $7) on conflict do nothing""",
        plan_foreign_keys(blueprint.foreign_keys, blueprint.post_data),
    )
    await target.executemany(
        "insert into _live_migration.late_statements (table_oid, label, statement) values ($1, $2, $3)",
        [(table.oid, each.label, each.statements) for each in blueprint.late],
    )


async def _make_table(target: asyncpg.Connection, newcomer: Newcomer, blueprint: Blueprint) -> None:
    statements: list[str] = []
    roots: set[QualifiedName] = set()
    hypertable = next((each for each in _hypertables(blueprint) if each.name == newcomer.name), None)
    await _run(target, blueprint.at_once(blueprint.pre_data))
    if newcomer.kind == "hypertable" and not blueprint.is_flat:
        if hypertable is None:
            raise NewcomerRefused("its definition cannot be read from the source's catalog")
        await _require_same_hashes(target, newcomer, blueprint)
        timescale = await _require_timescale(target)
        roots = {newcomer.name}
        for statement in hypertable_statements(hypertable, timescale):
            await target.execute(statement)
        statements = compression_statements(hypertable, timescale)
    await _run(target, [without_only(each, roots) for each in blueprint.at_once(blueprint.post_data)])
    for statement in statements:
        await target.execute(statement)
    await _try(target, [each for each in blueprint.late if each.type != "COMMENT"])


async def _require_same_hashes(target: asyncpg.Connection, newcomer: Newcomer, blueprint: Blueprint) -> None:
    """Refuse a hypertable whose rows belong into other chunks on the target."""
    found = assess_hash_dimensions(blueprint.dimensions, blueprint.encoding, await read_encoding(target))
    for each in found:
        if each.level == "error":
            raise NewcomerRefused(f"{each.what}. {each.hint} Or drop {newcomer.name}")


async def _run(target: asyncpg.Connection, entries: Sequence[Entry]) -> None:
    for entry in entries:
        for name, value in entry.defaults:
            await target.execute(f"set local {name} = {value}")
        await target.execute(entry.statements)


async def _try(target: asyncpg.Connection, entries: Sequence[Entry]) -> None:
    """Run what is made at the hand-over, and take it back: better refused now than then."""
    attempt = target.transaction()
    await attempt.start()
    await _run(target, entries)
    await attempt.rollback()


def _hypertables(blueprint: Blueprint) -> Sequence[Hypertable]:
    return blueprint.definitions.hypertables if blueprint.definitions else ()


async def _require_timescale(target: asyncpg.Connection) -> Target:
    timescale = await read_target(target)
    if timescale is None:
        raise NewcomerRefused("the target has no TimescaleDB")
    return timescale


async def _make_aggregate(target: asyncpg.Connection, newcomer: Newcomer, blueprint: Blueprint) -> None:
    aggregates = blueprint.definitions.aggregates if blueprint.definitions else ()
    aggregate = next((each for each in aggregates if each.name == newcomer.name), None)
    if aggregate is None:
        raise NewcomerRefused("its definition cannot be read from the source's catalog")
    timescale = await _require_timescale(target)
    for statement in (*aggregate_statements(aggregate, timescale), *aggregate_index_statements(aggregate)):
        await target.execute(statement)
