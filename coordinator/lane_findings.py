"""What `validate` finds of tables that are to have several lanes: whether the order of each key's changes is order enough."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from live_migration.common.lanes import BYTEWISE_TYPES, parse_lanes
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.common.settings import Settings
from live_migration.common.timescale import read_layout
from live_migration.coordinator.findings import Finding, error
from live_migration.coordinator.hypertable_spec import read_specs

_FACTS = """
    select c.oid, c.relkind::text as kind, c.relpersistence::text as persistence, c.relreplident::text as identity,
           i.indexrelid is not null as has_key,
           array(select o.relname::text from pg_index x join pg_class o on o.oid = x.indexrelid
                 where x.indrelid = c.oid and (x.indisunique or x.indisexclusion) and x.indexrelid is distinct from i.indexrelid
                 order by o.relname) as other_indexes,
           array(select a.attname || ' (' || format_type(a.atttypid, a.atttypmod)
                        || case when l.collisdeterministic then '' else coalesce(', collation ' || l.collname, '') end || ')'
                 from unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) with ordinality k (attnum, n)
                 join pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum
                 left join pg_collation l on l.oid = a.attcollation
                 where a.atttypid <> all($3::oid[]) or not coalesce(l.collisdeterministic, true) or a.attgenerated <> ''
                 order by k.n) as unfit_columns
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    left join pg_index i on i.indexrelid = pg_get_replica_identity_index(c.oid)
    where n.nspname = $1 and c.relname = $2
"""


@dataclass(frozen=True, slots=True)
class LaneFacts:
    """What the source says of a table that is to have several lanes.

    `kind`, `persistence`, `identity`: as in `pg_class`. `has_key`: rows are identified by an index. `other_indexes`: names of its unique indexes
    and exclusion constraints beside that one. `unfit_columns`: of the key, with their types, whose equality is not that of their bytes.
    """

    kind: str
    persistence: str
    identity: str
    has_key: bool
    other_indexes: tuple[str, ...]
    unfit_columns: tuple[str, ...]
    is_hypertable: bool


async def find_lanes(settings: Settings, source: asyncpg.Connection) -> list[Finding]:
    """Judge the tables of `--lanes`."""
    split = parse_lanes(settings.lanes)
    if not split:
        return []
    layout = await read_layout(source)
    hypertables = set(layout.hypertables) | set(layout.chunks) if layout else set()
    to_be = {spec.name for spec in read_specs(settings.hypertable, settings.hypertables_file)}
    found: list[Finding] = []
    for name, _ in split:
        row = await source.fetchrow(_FACTS, name.schema, name.name, list(BYTEWISE_TYPES))
        if row is None:
            found.append(error(f"--lanes names {name}, which the source does not have", "Check its schema and name."))
            continue
        facts = LaneFacts(
            row["kind"],
            row["persistence"],
            row["identity"],
            row["has_key"],
            tuple(row["other_indexes"]),
            tuple(row["unfit_columns"]),
            row["oid"] in hypertables or name in to_be,
        )
        found += assess_lanes(name, facts)
    return found


def assess_lanes(name: QualifiedName, facts: LaneFacts) -> list[Finding]:
    """Judge one table; what it is forbids the look at its keys."""
    if (kind := _unfit_kind(facts)) is not None:
        what, hint = kind
        return [error(f"{name} cannot have several lanes: {what}", hint)]
    found = []
    if facts.other_indexes:
        found.append(
            error(
                f"{name} cannot have several lanes: beside its key, {name_list(facts.other_indexes)} may tie rows of different keys together",
                "Leave it out of --lanes, or drop that index or constraint.",
            )
        )
    if facts.unfit_columns:
        found.append(
            error(
                f"{name} cannot have several lanes: key columns whose equal values may differ in their bytes: {name_list(facts.unfit_columns)}",
                "Leave it out of --lanes. Fit are bool, integers, uuid, dates and times, bytea, and text under a deterministic collation.",
            )
        )
    return found


def _unfit_kind(facts: LaneFacts) -> tuple[str, str] | None:
    """Give why a table of its kind cannot have several lanes, and what to do; None where it can."""
    leave_out = "Leave it out of --lanes."
    if facts.kind == "p":
        return "it is a partitioned table, and rows lie in its partitions", "Name the partitions that are hot."
    if facts.kind != "r":
        return "it is no table", leave_out
    if facts.is_hypertable:
        return "it is, or becomes, a hypertable, whose rows are changed a chunk at a time", leave_out
    if facts.persistence != "p":
        return "it is not logged, and has no changes in the stream", leave_out
    if not facts.has_key:
        identity = "its replica identity is FULL" if facts.identity == "f" else "it has no usable replica identity"
        return (
            f"{identity}, so no key tells its rows apart",
            "Give it a primary key that is not deferrable, and the replica identity DEFAULT.",
        )
    return None
