"""Whether our publications still publish every planned table, all of it: no server and no stream says so when they do not any more."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from live_migration.common.errors import PublicationLost
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.coordinator.run import Run
from live_migration.producer.publication import PublishedTable

_ALTERED = """
    select w.name, p.oid is null as is_gone
    from unnest($1::text[], $2::boolean[]) as w (name, has_all) left join pg_publication p on p.pubname = w.name
    where p.oid is null or not (p.pubinsert and p.pubtruncate and p.pubupdate = w.has_all and p.pubdelete = w.has_all)
    order by 1
"""

# Row filters and column lists came with 15.
_MEMBERS = """
    select c.oid, n.nspname as schema, c.relname as name, coalesce(m.in_first, false) as in_first, coalesce(m.is_whole, false) as is_whole,
           m.prrelid is not null as is_member
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    left join (select r.prrelid, bool_or(p.pubname = $2) as in_first,
                      bool_and(to_jsonb(r) ->> 'prqual' is null and to_jsonb(r) ->> 'prattrs' is null) as is_whole
               from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
               where p.pubname in ($2, $3) group by r.prrelid) m on m.prrelid = c.oid
    where c.oid = any($1::oid[]) and c.relpersistence = 'p'
"""

_FOLLOWED = """
    select oid, publication, kind, newcomer from _live_migration.tables
    where coalesce(newcomer, 'followed') in ('followed', 'met') and not is_left_out
"""


@dataclass(frozen=True, slots=True)
class Left:
    """A table of the plan that is in our publications no more, not where it was, or by a row filter or column list.

    `is_root`: a hypertable of the plan, which cannot be copied again by itself.
    """

    table: PublishedTable
    kind: str
    is_root: bool

    def __str__(self) -> str:
        return str(self.table.name)


async def find_left(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> list[Left]:
    """Give the tables of the plan of which the stream does not tell all any more.

    Chunks that are in no publication are not among them: whoever watches chunks finds those, and has them copied anew.
    """
    before = await _followed(target)
    found = await _look(run, source, before)
    if not found:
        return []
    # A table whose identity is lost just now is recorded first, then moved: what the plan says by now counts.
    after = await _followed(target)
    return [left for left in found if after.get(left.table.oid) == before[left.table.oid]]


async def _followed(target: asyncpg.Connection) -> dict[int, asyncpg.Record]:
    with asking("target", "reading the plan"):
        return {row["oid"]: row for row in await target.fetch(_FOLLOWED)}


async def _look(run: Run, source: asyncpg.Connection, plan: dict[int, asyncpg.Record]) -> list[Left]:
    settings = run.settings
    with asking("source", "comparing the publications with the plan"):
        rows = await source.fetch(_MEMBERS, list(plan), settings.publication, settings.insert_publication)
    left = []
    for row in rows:
        planned = plan[row["oid"]]
        is_chunk = planned["kind"] == "chunk"
        is_there = row["in_first"] or (row["is_member"] and (is_chunk or planned["publication"] == "insert"))
        if (is_there and row["is_whole"]) or (is_chunk and not row["is_member"]):
            continue
        table = PublishedTable(row["oid"], QualifiedName(row["schema"], row["name"]))
        is_root = planned["kind"] == "hypertable" and planned["newcomer"] is None
        left.append(Left(table, planned["kind"], is_root))
    return left


async def require_publications(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> None:
    """Raise PublicationLost when a publication is gone or publishes less than it was made for, or a hypertable has left it."""
    settings = run.settings
    with asking("source", "looking at the publications"):
        rows = await source.fetch(_ALTERED, [settings.publication, settings.insert_publication], [True, False])
    if rows:
        found = [
            f"publication {row['name']} "
            + (
                "does not exist on the source any more"
                if row["is_gone"]
                else "was altered: it publishes other operations"
            )
            for row in rows
        ]
        raise PublicationLost(f"{'; '.join(found)}: changes since then are lost")
    if roots := [left for left in await find_left(run, source, target) if left.is_root]:
        raise PublicationLost(
            f"hypertables are not published as they were: {name_list(str(root) for root in roots)}: changes since then are lost"
        )
