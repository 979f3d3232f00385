"""What comes to the target only behind the last barrier, in the downtime, and that the target could not have as it is now."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.catalog import USERS_OWN
from live_migration.common.progress import format_number_of, name_list
from live_migration.coordinator.findings import Finding, error, warning

_OIDS = 10_000
_TABLES_IN_SCHEMA = 150_000

_POLICIES = f"""
    select r.rolname::text as role, format('policy %s of %s.%s', p.polname, n.nspname, c.relname) as policy
    from pg_policy p join pg_class c on c.oid = p.polrelid join pg_namespace n on n.oid = c.relnamespace
    join pg_roles r on r.oid = any(p.polroles)
    where {USERS_OWN}
    order by 1, 2
"""

_EVENT_TRIGGERS = """
    select format('event trigger %s', evtname) from pg_event_trigger e
    where not exists (select from pg_depend d where d.classid = 'pg_event_trigger'::regclass and d.objid = e.oid and d.deptype = 'e')
    order by 1
"""
_ALL_TABLES = """
    select format('publication %s (for all tables)', pubname) from pg_publication where puballtables and pubname <> all($1::text[]) order by 1
"""
_IN_SCHEMA = """
    select distinct format('publication %s (tables in schema)', pubname)
    from pg_publication_namespace n join pg_publication p on p.oid = n.pnpubid where pubname <> all($1::text[]) order by 1
"""


_CLOSED_SEQUENCES = f"""
    select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'S' and c.relpersistence in ('p', 'u') and {USERS_OWN}
      and not (has_schema_privilege(n.oid, 'usage') and has_sequence_privilege(c.oid, 'select'))
    order by 1
"""
_CLOSED_OBJECTS = """
    select oid from pg_largeobject_metadata
    where not pg_has_role(lomowner, 'usage') and not current_setting('lo_compat_privileges')::bool
      and not exists (select from aclexplode(lomacl) a
                      where a.privilege_type = 'SELECT' and (a.grantee = 0 or pg_has_role(a.grantee, 'usage')))
    order by oid
"""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What the source's role may not read and is to be read behind the last barrier."""

    sequences: tuple[str, ...]
    large_objects: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoleUse:
    """A role that a policy of the source is for."""

    role: str
    policy: str


async def find_missing_roles(source: asyncpg.Connection, target: asyncpg.Connection) -> list[RoleUse]:
    """Give the roles that policies of the source name and the target lacks."""
    uses = [RoleUse(row["role"], row["policy"]) for row in await source.fetch(_POLICIES)]
    if not uses:
        return []
    present = {row[0] for row in await target.fetch("select rolname::text from pg_roles")}
    return [use for use in uses if use.role not in present]


def assess_roles(missing: Sequence[RoleUse], *, is_begun: bool) -> list[Finding]:
    """Name the roles that must be there before the cutover: roles are not carried over.

    `is_begun`: the migration goes on without them, up to the cutover.
    """
    if not missing:
        return []
    roles = list(dict.fromkeys(use.role for use in missing))
    names = name_list(f"{use.role} ({use.policy})" for use in missing)
    hint = f"Make them on the target (`create role`): {name_list(roles)}; or drop these policies on the source."
    level = warning if is_begun else error
    return [level(f"the target lacks roles that policies of the source are for: {names}", hint)]


async def find_privileged(source: asyncpg.Connection, target: asyncpg.Connection, ours: Sequence[str]) -> list[str]:
    """Give what of the source only a superuser can make, where the target's role is none. `ours`: our publications."""
    if await target.fetchval("select rolsuper from pg_roles where rolname = current_user"):
        return []
    found = [*await source.fetch(_EVENT_TRIGGERS), *await source.fetch(_ALL_TABLES, ours)]
    if await source.fetchval("select current_setting('server_version_num')::int") >= _TABLES_IN_SCHEMA:
        found += await source.fetch(_IN_SCHEMA, ours)
    return [row[0] for row in found]


def assess_privileged(names: Sequence[str]) -> list[Finding]:
    """Announce what is left out where the target refuses it; managed services let some of it through."""
    if not names:
        return []
    return [
        warning(
            f"the target's role is no superuser, and may be refused what is then left out at the cutover: {name_list(names)}",
            "Make them on the target afterwards, as a superuser; or migrate as one.",
        )
    ]


async def find_taken_oids(source: asyncpg.Connection, target: asyncpg.Connection) -> list[int]:
    """Give oids of large objects that both sides have."""
    taken: list[int] = []
    above = 0
    while True:
        rows = await target.fetch(
            "select oid from pg_largeobject_metadata where oid > $1 order by oid limit $2", above, _OIDS
        )
        if not rows:
            return taken
        oids = [row[0] for row in rows]
        above = oids[-1]
        both = await source.fetch(
            "select oid from pg_largeobject_metadata where oid = any($1::oid[]) order by oid", oids
        )
        taken += [row[0] for row in both]


def assess_taken_oids(taken: Collection[int]) -> list[Finding]:
    """Refuse a target whose large objects bear the oids of the source's, under which these are to be copied."""
    if not taken:
        return []
    what = format_number_of(len(taken), "large object")
    return [
        error(
            f"the target holds {what} with oids of the source's: {name_list(taken)}",
            "Remove them from the target with `lo_unlink` if nobody needs them; or use another database.",
        )
    ]


async def find_unreadable(source: asyncpg.Connection) -> Unreadable:
    """Give sequences and large objects that the source's role may not read."""
    return Unreadable(
        tuple(row[0] for row in await source.fetch(_CLOSED_SEQUENCES)),
        tuple(row[0] for row in await source.fetch(_CLOSED_OBJECTS)),
    )


def assess_unreadable(closed: Unreadable) -> list[Finding]:
    """Refuse what could not be read in the downtime. `pg_read_all_data` opens sequences, but no large objects."""
    found = []
    if closed.sequences:
        found.append(
            error(
                f"the source's role lacks SELECT on sequences, or USAGE on their schemas: {name_list(closed.sequences)}",
                "`grant pg_read_all_data to …`, or `grant usage on schema …` and `grant select on sequence …`.",
            )
        )
    if closed.large_objects:
        what = format_number_of(len(closed.large_objects), "large object")
        found.append(
            error(
                f"the source's role may not read {what}, by oid: {name_list(closed.large_objects)}",
                "`grant select on large object … to …` for each, make it a member of their owners, or connect as a superuser.",
            )
        )
    return found
