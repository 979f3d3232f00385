"""Whether rows of a table without replica identity were updated or deleted, which no stream tells: the source's statistics count them.

What they count is worth something only as long as they are the ones of the plan. A crash discards them, a standby has its own, somebody may
reset them; and a session hands in late what it did last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from live_migration.common.catalog import CURRENT_TIMELINE, TableInfo
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.coordinator.run import APPLICATION, Run

STATISTICS = f"""(
    select concat_ws('/', {CURRENT_TIMELINE}, extract(epoch from b.stats_reset), extract(epoch from d.stats_reset))
    from pg_stat_bgwriter b, pg_stat_database d
    where d.datname = current_database() and current_setting('track_counts')::bool)"""
"""Names the statistics that a database counts in, null where nothing is counted: an expression.

What is shared is begun anew by a crash, and is another server's on a standby, unless that was made from a copy of this one's folder, which
the timeline tells. A database's are reset as a whole, or one table's of them. A clean restart keeps all of it.
"""

_LATE_SECONDS = 11.0
"""From 15 on an idle session hands in within 10 s what it holds; and whoever comes to be idle later than 1 s after, at once."""
_FILE_SECONDS = 1.0
"""Before 15 an idle session hands in nothing; what others have handed in is shown within half a second."""
_MOST_SECONDS = 60.0
_HANDED_IN_WHEN_IDLE = 150_000

# $1: since when nobody writes, $2: our application names, $3: seconds. A session that we may not look at shows no state: it counts as idle.
_HOLDERS = """
    select format('pid %s (%s, %s)', pid, coalesce(nullif(application_name, ''), 'no application name'), coalesce(state, 'state not shown'))
    from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid() and application_name not like $2
      and coalesce(backend_type = 'client backend', true) and coalesce(backend_start < $1, true)
      and not coalesce(
          case coalesce(state, 'disabled')
              when 'idle' then clock_timestamp() > least(state_change, $1) + make_interval(secs => $3)
              when 'disabled' then clock_timestamp() > $1 + make_interval(secs => $3)
              else xact_start > $1 + make_interval(secs => $3) end, false)
    order by pid
"""

_UNFOLLOWED = """
    select t.oid, t.changed_row_count, coalesce(t.statistics, h.statistics) as statistics
    from _live_migration.tables t left join _live_migration.tables h on h.oid = t.hypertable_oid
    where t.publication = 'insert' and t.kind <> 'hypertable' and not t.copy_again and not t.is_left_out
      and t.newcomer is distinct from 'gone'
"""
_HAS_ROOTS = "select exists (select from _live_migration.tables where publication = 'insert' and kind = 'hypertable' and not is_left_out)"


async def read_statistics(source: asyncpg.Connection) -> str | None:
    """Name the statistics that the source counts in now; of two names that are equal all that was counted between is there."""
    with asking("source", "looking at the statistics"):
        name: str | None = await source.fetchval(f"select {STATISTICS}")
    return name


@dataclass(frozen=True, slots=True)
class Unfollowed:
    """The source's tables, and whether a session may have changed some that has not reported it."""

    tables: list[TableInfo]
    is_doubtful: bool


async def mark_unfollowed(run: Run, source: asyncpg.Connection, tables: list[TableInfo]) -> Unfollowed:
    """Mark tables of the plan without identity in which rows were, or may have been, updated or deleted since it was made.

    Where that leaves some, sessions that may report late are waited for; the tables given are of after that.
    """
    if not await _mark(run, source, tables):
        return Unfollowed(tables, is_doubtful=False)
    holders = await _await_statistics(run, source)
    tables = await run.list_tables(source)
    left = await _mark(run, source, tables)
    if left and holders:
        unsure = [table for table in tables if table.oid in left]
        await _copy_again(run, unsure, f"may have been updated or deleted by {name_list(holders)}, unreported yet")
    return Unfollowed(tables, is_doubtful=bool(holders))


async def _mark(run: Run, source: asyncpg.Connection, tables: Iterable[TableInfo]) -> set[int]:
    """Mark what is known to have changed, or cannot be known; give what is left of tables without identity."""
    now = await read_statistics(source)  # later than the tables: of statistics that went between, the name tells
    with asking("target", "reading the plan"):
        planned = {row["oid"]: row for row in await run.target.fetch(_UNFOLLOWED)}
        has_roots = await run.target.fetchval(_HAS_ROOTS)
    there = [table for table in tables if table.oid in planned]
    unknown = [table for table in there if now is None or planned[table.oid]["statistics"] != now]
    doubtful = {table.oid for table in unknown}
    changed = [
        table
        for table in there
        if table.oid not in doubtful and table.changed_row_count != planned[table.oid]["changed_row_count"]
    ]
    await _copy_again(run, changed, "were updated or deleted on the source")
    await _copy_again(
        run,
        unknown,
        "may have been updated or deleted on the source, whose statistics were discarded since the plan (a crash, a failover, a reset), or are off",
    )
    left = {table.oid for table in there} - doubtful - {table.oid for table in changed}
    # A chunk that came after the plan has no row in it: its hypertable stands for it.
    return left | ({0} if has_roots else set())


async def _copy_again(run: Run, tables: list[TableInfo], what: str) -> None:
    if not tables:
        return
    with asking("target", "marking tables to be copied again"):
        await run.target.execute(
            "update _live_migration.tables set copy_again = true where oid = any($1::oid[])", [t.oid for t in tables]
        )
    run.reporter.warning(
        f"rows of {name_list(table.name for table in tables)} {what}, and without a replica identity that is not in the stream: copied once more"
    )


async def _await_statistics(run: Run, source: asyncpg.Connection) -> list[str]:
    """Wait until every session has handed in what it did before now; give those that did not, after a while."""
    if run.migration.source_version < _HANDED_IN_WHEN_IDLE:
        await asyncio.sleep(_FILE_SECONDS)
        return []
    with asking("source", "reading the time"):
        since: datetime = await source.fetchval("select clock_timestamp()")
    told, waited = False, 0.0
    while True:
        with asking("source", "looking for sessions that report late"):
            rows = await source.fetch(_HOLDERS, since, f"{APPLICATION}%", _LATE_SECONDS)
        holders = [row[0] for row in rows]
        if not holders or waited >= _MOST_SECONDS:
            return holders
        if not told:
            told = True
            run.reporter.note(
                f"tables without replica identity are copied again where rows were changed: waiting up to {_MOST_SECONDS:.0f} s for the "
                f"statistics of {name_list(holders)}; ending them ends the wait"
            )
        await asyncio.sleep(0.25)
        waited += 0.25
