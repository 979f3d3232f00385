"""What of a source's hypertables, aggregates and jobs a target of another version cannot be given: named before the start.

Licence, tiered chunks, tablespaces, owners and aggregates of the old format are judged in `timescale_findings`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import asyncpg

from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import parse_version
from live_migration.coordinator.findings import Finding, error, warning
from live_migration.coordinator.hypertable_definitions import (
    Compression,
    ContinuousAggregate,
    Definitions,
    Hypertable,
    Job,
    SparseIndex,
    is_own_schema,
)
from live_migration.coordinator.hypertable_sql import Target, can_make

UUID_SINCE = (2, 22)

_TARGET = """
    select e.extversion::text as version, n.nspname::text as schema
    from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'timescaledb'
"""
_ABSENT = """
    select w.schema, w.name from unnest($1::text[], $2::text[]) as w (schema, name)
    where not exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                      where n.nspname = w.schema and p.proname = w.name)
"""


async def read_target(connection: asyncpg.Connection) -> Target | None:
    """Give what statements must know of a database's TimescaleDB; None where it has none."""
    row = await connection.fetchrow(_TARGET)
    if row is None:
        return None
    return Target(parse_version(row["version"]), row["schema"])


async def read_absent(
    connection: asyncpg.Connection, definitions: Definitions, *, own_only: bool
) -> frozenset[QualifiedName]:
    """Give the functions that definitions need and a target lacks; with `own_only` those that TimescaleDB itself brings.

    Users' functions come with the schema, so they are looked for once it is there.
    """
    wanted = sorted(name for name in functions_of(definitions) if not own_only or is_own_schema(name.schema))
    rows = await connection.fetch(_ABSENT, [each.schema for each in wanted], [each.name for each in wanted])
    return frozenset(QualifiedName(row["schema"], row["name"]) for row in rows)


def functions_of(definitions: Definitions) -> frozenset[QualifiedName]:
    """Give every function that hypertables and jobs name."""
    names: set[QualifiedName | None] = set()
    for hypertable in definitions.hypertables:
        for dimension in hypertable.dimensions:
            names |= {dimension.function, dimension.now_function}
    for job in definitions.jobs:
        names |= {job.procedure, job.check}
    return frozenset(name for name in names if name)


def jobs_to_make(definitions: Definitions, absent: Collection[QualifiedName] = ()) -> tuple[Job, ...]:
    """Give the jobs whose functions the target has."""
    return tuple(job for job in definitions.jobs if job.procedure not in absent and job.check not in absent)


def assess_definitions(
    definitions: Definitions, target: Target, absent: Collection[QualifiedName] = ()
) -> list[Finding]:
    """Judge what the target cannot be given; an error where something could not be made at all, a warning for what is left out."""
    return [
        *_assess_schema(definitions, target),
        *_assess_dimensions(definitions, target, absent),
        *_assess_settings(definitions, target),
        *_assess_jobs(definitions, absent),
    ]


def _assess_schema(definitions: Definitions, target: Target) -> Iterable[Finding]:
    if definitions.aggregates and target.schema != definitions.schema:
        yield error(
            f"the target has TimescaleDB in schema {target.schema}, the source in {definitions.schema}, and continuous "
            "aggregates name its functions by schema",
            f"On the target: drop extension timescaledb; create extension timescaledb with schema {definitions.schema}.",
        )


def _assess_dimensions(
    definitions: Definitions, target: Target, absent: Collection[QualifiedName]
) -> Iterable[Finding]:
    needed = {
        function: each.name
        for each in definitions.hypertables
        for dimension in each.dimensions
        for function in (dimension.function, dimension.now_function)
        if function in absent
    }
    for function, name in needed.items():
        yield error(f"hypertable {name} needs function {function}, which the target lacks", "Create it on the target.")
    uuid = [each.name for each in definitions.hypertables if each.dimensions[0].type == "uuid"]
    if uuid and target.version < UUID_SINCE:
        yield error(
            f"hypertables are partitioned by a UUID, which TimescaleDB can from 2.22 on: {name_list(uuid)}",
            "Upgrade TimescaleDB on the target.",
        )


def _assess_settings(definitions: Definitions, target: Target) -> Iterable[Finding]:
    lost = sorted(
        f"{each.name} ({', '.join(sorted({index.type for index in indexes}))})"
        for each in _relations(definitions)
        if (indexes := _unknown_indexes(each.compression, target))
    )
    if lost:
        yield warning(
            f"sparse indexes of compressed chunks that the target's TimescaleDB does not know are left out: {name_list(lost)}"
        )
    extras = [f"{each.name}: {extra}" for each in _relations(definitions) for extra in each.extras]
    if extras:
        yield warning(
            f"settings are not carried over: {name_list(extras)}", "Set them on the target after the cutover."
        )


def _assess_jobs(definitions: Definitions, absent: Collection[QualifiedName]) -> Iterable[Finding]:
    makeable = jobs_to_make(definitions, absent)
    left_out = [str(job) for job in definitions.jobs if job not in makeable]
    if left_out:
        yield warning(
            f"jobs are left out, for the target lacks their procedures: {name_list(left_out)}",
            "Its TimescaleDB may be older than the source's.",
        )
    with_ids = [str(job) for job in makeable if not job.is_policy and job.config and 'hypertable_id"' in job.config]
    if with_ids:
        yield warning(
            f"jobs of users may name a hypertable by its id, which is another on the target: {name_list(with_ids)}",
            "Look at their config before they run there: alter_job(…, config => …).",
        )


def _unknown_indexes(compression: Compression | None, target: Target) -> list[SparseIndex]:
    indexes = (compression.sparse_indexes or ()) if compression else ()
    return [index for index in indexes if not can_make(index, target.version)]


def _relations(definitions: Definitions) -> list[Hypertable | ContinuousAggregate]:
    return [*definitions.hypertables, *definitions.aggregates]
