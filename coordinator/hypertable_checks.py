"""What stands against making tables hypertables: facts of the source's tables in, findings out. Pure.

What TimescaleDB refuses was tried on 2.24 and 2.29; what it began to take, by release, is in the constants here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from live_migration.common.progress import format_bytes, format_count, name_list
from live_migration.common.relation import QualifiedName
from live_migration.coordinator.findings import Finding, error, warning
from live_migration.coordinator.hypertable_skips import Skips, TableObject
from live_migration.coordinator.hypertable_spec import DAY, SECOND, HypertableSpec, format_interval
from live_migration.coordinator.hypertable_tables import INTEGER_TYPES, Column, ForeignKey, Key, Table

REFERENCES_SINCE = (2, 16)
"""From here on a plain table may refer to a hypertable by a foreign key."""
MANY_CHUNKS = 5_000
TOO_MANY_CHUNKS = 100_000
NOTHING = Skips()


def assess_specs(
    specs: Sequence[HypertableSpec],
    tables: Sequence[Table],
    version: tuple[int, ...] | None,
    *,
    skips: Skips = NOTHING,
    memory_bytes: int = 0,
) -> list[Finding]:
    """Judge each table that is to become a hypertable.

    `version`: of the target's TimescaleDB, None where it has none; `memory_bytes`: the target's, 0 where not known; `skips`: what is to be left out, and so is a warning, where it is among `incompatible_objects`.
    """
    if version is None:
        return [_no_extension()] if specs else []
    by_name = {table.name: table for table in tables}
    found: list[Finding] = []
    for spec in specs:
        table = by_name.get(spec.name)
        if table is None:
            found.append(error(f"hypertable {spec.name}: there is no such table on the source", _near(spec, by_name)))
            continue
        found += _assess_table(spec, table)
        columns = list(_assess_columns(spec, table))
        found += columns
        if not columns:
            found += _assess_interval(spec, table, memory_bytes)
            found += _assess_keys(spec, table, skips)
            found += _assess_references(spec, table, specs, version, skips)
            found += _assess_identity(spec, table)
    return found + list(_assess_skips(specs, tables, version, skips))


def incompatible_objects(
    specs: Sequence[HypertableSpec], tables: Sequence[Table], version: tuple[int, ...]
) -> dict[TableObject, frozenset[int]]:
    """Give what the target's hypertables cannot have: indexes with their constraints, and foreign keys, each with its oids.

    Foreign keys that refer to a key which they cannot have are among them.
    """
    by_name = {table.name: table for table in tables}
    found: dict[TableObject, frozenset[int]] = {}
    for spec in specs:
        if table := by_name.get(spec.name):
            for key in keys_without(spec, table):
                found[TableObject(table.name, key.name)] = frozenset(filter(None, (key.oid, key.constraint)))
            for reference, _ in _refused_references(spec, table, specs, version):
                found[TableObject(reference.table, reference.name)] = frozenset({reference.oid})
    return found


def skipped_oids(
    specs: Sequence[HypertableSpec], tables: Sequence[Table], version: tuple[int, ...], skips: Skips
) -> frozenset[int]:
    """Give the oids of what is left out on the target: indexes, their constraints, foreign keys."""
    found = incompatible_objects(specs, tables, version)
    return frozenset(oid for each, oids in found.items() if skips.has(each.table, each.name) for oid in oids)


def keys_without(spec: HypertableSpec, table: Table) -> list[Key]:
    """Give the unique keys that lack a partitioning column, and so cannot be checked within a chunk."""
    return [key for key in table.keys if not set(spec.partitioning_columns) <= set(key.columns)]


def _no_extension() -> Finding:
    return error(
        "hypertables are asked for, but the target's database has no TimescaleDB",
        "`create extension timescaledb` there, or leave out --hypertable and --hypertables-file.",
    )


def _assess_skips(
    specs: Sequence[HypertableSpec], tables: Sequence[Table], version: tuple[int, ...], skips: Skips
) -> Iterable[Finding]:
    incompatible = incompatible_objects(specs, tables, version)
    for each in skips.unused(incompatible):
        yield error(
            f"--skip-hypertable-object {each}: there is no such key or foreign key that hypertables cannot have",
            f"They cannot have: {name_list(sorted(incompatible)) or 'nothing of these tables is in their way'}.",
        )


def _near(spec: HypertableSpec, by_name: Mapping[QualifiedName, Table]) -> str:
    like = sorted(name for name in by_name if name.name.lower() == spec.name.name.lower())
    return f"Is it {name_list(like)}?" if like else 'Upper case needs quotes: \'"Schema"."Table":time,1 day\'.'


def _assess_table(spec: HypertableSpec, table: Table) -> Iterable[Finding]:
    leave = "Leave it out of --hypertable"
    if table.is_partitioned:
        yield error(
            f"hypertable {spec.name}: the table is partitioned already, and TimescaleDB takes plain tables only",
            f"{leave} to keep its partitions, or move its rows into a plain table on the source first.",
        )
    elif table.is_inherited:
        yield error(
            f"hypertable {spec.name}: the table is a partition, or inherits or is inherited from",
            f"{leave}, or end the inheritance on the source (alter table … no inherit …).",
        )
    if table.is_unlogged:
        yield warning(
            f"hypertable {spec.name}: the table is unlogged, and so would its chunks be; a crash of the target empties them",
            f"`alter table {spec.name.sql} set logged` on the source, or on the target afterwards.",
        )
    for what, names in (
        ("rules", table.rules),
        ("CHECK constraints with NO INHERIT", table.not_inherited_checks),
        ("row triggers with transition tables", table.transition_triggers),
    ):
        if names:
            yield error(
                f"hypertable {spec.name}: hypertables cannot have {what}: {name_list(names)}",
                f"Drop them on the source if nobody needs them, or {leave.lower()}.",
            )


def _assess_columns(spec: HypertableSpec, table: Table) -> Iterable[Finding]:
    for name in spec.partitioning_columns:
        column = table.column(name)
        if column is None:
            names = name_list(each.name for each in table.columns)
            yield error(f"hypertable {spec.name}: it has no column {name}", f"It has: {names}.")
        elif column.is_generated:
            yield error(
                f"hypertable {spec.name}: column {name} is generated, and rows must be sorted into chunks before it is",
                "Partition by a column that the rows carry.",
            )
        elif name == spec.column:
            yield from _assess_time_column(spec, table, column)
        elif not column.is_hashable:
            yield error(
                f"hypertable {spec.name}: column {name} of type {column.type} has no hash to spread rows by",
                "Choose another partition column, or none.",
            )


def _assess_time_column(spec: HypertableSpec, table: Table, column: Column) -> Iterable[Finding]:
    if not (column.is_time or column.is_integer):
        usable = [each.name for each in table.columns if each.is_time or each.is_integer]
        yield error(
            f"hypertable {spec.name}: column {column.name} is of type {column.type}; it must be a timestamp, date or integer",
            f"Columns of such types: {name_list(usable) or 'none'}.",
        )
    elif not column.not_null:
        yield error(
            f"hypertable {spec.name}: column {column.name} may be null, and a row without a time has no chunk",
            f"`alter table {spec.name.sql} alter column … set not null` on the source, or choose another column.",
        )
    elif column.is_time and not spec.is_duration:
        yield error(
            f"hypertable {spec.name}: the interval {spec.interval} lacks a unit, and {column.name} is a {column.type}",
            "Give an interval such as '1 day'.",
        )
    elif column.is_integer and spec.is_duration:
        yield error(
            f"hypertable {spec.name}: {column.name} is a {column.type}, whose interval is a plain number",
            "Give it in the column's own unit: a day is 86400 where it counts seconds, 86400000 for milliseconds.",
        )
    elif column.type_oid == 1082 and spec.interval % DAY:
        yield error(f"hypertable {spec.name}: {column.name} is a date, whose interval is whole days", "Round it up.")
    elif column.is_integer and spec.interval > INTEGER_TYPES[column.type_oid]:
        yield error(
            f"hypertable {spec.name}: the interval {spec.interval} is larger than any {column.type}", "Make it smaller."
        )


def _assess_interval(spec: HypertableSpec, table: Table, memory_bytes: int) -> Iterable[Finding]:
    column = table.column(spec.column)
    span = column.span if column else None
    if span is None:
        return
    length = spec.interval / SECOND if spec.is_duration else spec.interval
    chunks = span / length
    shown = format_interval(spec.interval) if spec.is_duration else format_count(spec.interval)
    if chunks > MANY_CHUNKS:
        judge = error if chunks > TOO_MANY_CHUNKS else warning
        yield judge(
            f"hypertable {spec.name}: with an interval of {shown} it would have about {format_count(chunks)} chunks",
            "Make the interval longer: some thousand chunks are many.",
        )
    chunk_bytes = table.size_bytes / max(chunks, 1)
    if 0 < memory_bytes < chunk_bytes:
        yield warning(
            f"hypertable {spec.name}: with an interval of {shown} a chunk would have about {format_bytes(chunk_bytes)}, more "
            f"than the target's memory ({format_bytes(memory_bytes)})",
            "Make the interval shorter: a quarter of the memory is a good size.",
        )


def _assess_keys(spec: HypertableSpec, table: Table, skips: Skips) -> Iterable[Finding]:
    for key in keys_without(spec, table):
        missing = [name for name in spec.partitioning_columns if name not in key.columns]
        what = f"hypertable {spec.name}: {key.kind} {key.name} lacks the partitioning column {' and '.join(missing)}"
        if skips.has(table.name, key.name):
            yield warning(f"{what}; it is left out on the target", "Nothing there keeps its values unique.")
        else:
            columns = ", ".join((*key.columns, *missing))
            yield error(
                what,
                f"Make it one over ({columns}) on the source, or {_skip(table.name, key.name)}, or leave the table out of --hypertable.",
            )


def _assess_references(
    spec: HypertableSpec,
    table: Table,
    specs: Sequence[HypertableSpec],
    version: tuple[int, ...],
    skips: Skips,
) -> Iterable[Finding]:
    for reference, why in _refused_references(spec, table, specs, version):
        what = f"hypertable {spec.name}: foreign key {reference.name} of {reference.table} refers to it, {why}"
        if skips.has(reference.table, reference.name):
            yield warning(f"{what}; it is left out on the target", "Nothing there checks it.")
        else:
            skip = _skip(reference.table, reference.name)
            yield error(what, f"Drop it on the source, or {skip}, or leave the table out of --hypertable.")


def _skip(table: QualifiedName, name: str) -> str:
    return (
        f"leave it out on the target with --skip-hypertable-object '{TableObject(table, name)}' "
        "(--skip-hypertable-incompatible-objects for all such)"
    )


def _refused_references(
    spec: HypertableSpec, table: Table, specs: Sequence[HypertableSpec], version: tuple[int, ...]
) -> Iterable[tuple[ForeignKey, str]]:
    hypertables = {each.name for each in specs}
    without = {key.oid: key for key in keys_without(spec, table)}
    for reference in table.references:
        if reference.table in hypertables:
            yield reference, "and a hypertable cannot refer to a hypertable"
        elif version < REFERENCES_SINCE:
            yield reference, "which TimescaleDB takes from 2.16 on only"
        elif reference.key in without:
            yield reference, f"by a key that it cannot have ({without[reference.key].name})"


def _assess_identity(spec: HypertableSpec, table: Table) -> Iterable[Finding]:
    missing = [name for name in spec.partitioning_columns if name not in table.identity_columns]
    if table.identity_columns and missing:
        yield warning(
            f"hypertable {spec.name}: updates and deletes in the stream are identified by "
            f"({', '.join(table.identity_columns)}), without {' and '.join(missing)}: the target looks into every chunk for each",
            "Give it a unique index that has the partitioning columns, as replica identity, on the source.",
        )
