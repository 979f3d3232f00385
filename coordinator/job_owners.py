"""Who owns the target's jobs: a policy whoever owns the hypertable or aggregate that it works on, as TimescaleDB itself makes it; a user's action its owner.

A policy works on nothing that its owner has not the rights of. What is migrated belongs to the role that migrates, and so do policies, until somebody
gives tables away: 2.24 leaves the policies of those as they are, 2.29 gives them away, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

_SCHEMAS = ("_timescaledb_functions", "_timescaledb_internal")
"""Where the procedures of policies are."""
_TABLES = """
    join _timescaledb_catalog.hypertable h on h.id = j.hypertable_id
    join pg_namespace n on n.nspname = h.schema_name join pg_class c on c.relnamespace = n.oid and c.relname = h.table_name
"""
# A role without LOGIN runs no job.
_GIVE = f"""
    update {{jobs}} t set owner = found.owner from (
        select j.id, c.relowner::regrole as owner from {{jobs}} j {_TABLES}
        join pg_roles r on r.oid = c.relowner and r.rolcanlogin
        where j.proc_schema::text = any($2::text[]) and j.owner::oid <> c.relowner
    ) found
    where t.id = found.id and t.id = any($1::int[])
"""
_HELPLESS = f"""
    select j.id, coalesce(r.rolname, 'nobody')::text as owner from {{jobs}} j left join pg_roles r on r.oid = j.owner::oid
    where j.id = any($1::int[]) and (r.rolcanlogin is not true or exists (
        select from {{jobs}} i {_TABLES.replace("j.hypertable_id", "i.hypertable_id")}
        where i.id = j.id and j.proc_schema::text = any($2::text[]) and not pg_has_role(r.oid, c.relowner, 'usage')
    ))
    order by j.id
"""


def give_policies(content: bytes, columns: Sequence[str], owner: str) -> bytes:
    """Give all policies among the rows of the table of jobs, in COPY's text format, to one role; pure.

    `owner`: its name as SQL writes it. Nobody may be able to tell the target of the source's: the role may be missing there.
    """
    schema, place = columns.index("proc_schema"), columns.index("owner")
    policies, value = {each.encode() for each in _SCHEMAS}, owner.replace("\\", "\\\\").encode()
    rows = [line.split(b"\t") for line in content.split(b"\n")]
    for row in rows:
        if len(row) == len(columns) and row[schema] in policies:
            row[place] = value
    return b"\n".join(b"\t".join(row) for row in rows)


async def give_policies_to_owners(target: asyncpg.Connection, jobs: str, ids: Sequence[int]) -> None:
    """Give each of these policies to whom its hypertable or aggregate belongs by now; nothing where our role may not write the table of jobs."""
    if await target.fetchval("select has_table_privilege($1, 'update')", jobs):
        await target.execute(_GIVE.format(jobs=jobs), ids, _SCHEMAS)


async def find_helpless(target: asyncpg.Connection, jobs: str, ids: Sequence[int]) -> dict[int, str]:
    """Give which of these jobs will fail, with their owners: these may not log in, or lack the rights of whom the policy's table belongs to."""
    rows = await target.fetch(_HELPLESS.format(jobs=jobs), ids, _SCHEMAS)
    return {row["id"]: row["owner"] for row in rows}
