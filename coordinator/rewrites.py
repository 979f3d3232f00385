"""Tables whose rows DDL on the source gave new values, or other names, which no stream tells: they are copied once more behind the last barrier."""

from __future__ import annotations

import asyncpg

from live_migration.common.catalog import TableInfo
from live_migration.common.postgres import asking
from live_migration.common.progress import format_bytes
from live_migration.common.rewriting import find_rewrite, remember
from live_migration.coordinator.run import Run

# A chunk that nobody copied, for it came after the plan, has its hypertable's mark.
_COPIED = """
    select t.oid, t.file_mark, coalesce(t.file_mark, h.file_mark) as mark,
           case when t.file_mark is null then h.oid else t.oid end as marked
    from _live_migration.tables t left join _live_migration.tables h on h.oid = t.hypertable_oid
    where t.state in ('copied', 'ready') and t.kind <> 'hypertable' and t.newcomer is distinct from 'gone'
      and not t.copy_again and not t.is_left_out
"""
_COPY_AGAIN = """
    update _live_migration.tables
    set copy_again = true, error = $3::text || ': its rows'' values are not in the stream',
        hint = 'It is copied again at the cutover; keep that in mind if it is big.'
    where oid = $1 and file_mark is not distinct from $2 and not copy_again
"""
_REMEMBER = "update _live_migration.tables set file_mark = $3 where oid = $1 and file_mark = $2"


async def mark_rewritten(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> None:
    """Mark and name tables whose rows may have got new values since they were copied."""
    with asking("target", "reading the plan"):
        copied = await target.fetch(_COPIED)  # before the source: what is copied anew meanwhile has a newer mark
    tables = {table.oid: table for table in await run.list_tables(source)}
    for row in copied:
        table, marked = tables.get(row["oid"]), tables.get(row["marked"] or 0)
        if table is None or marked is None:
            continue
        what = find_rewrite(row["mark"], marked.file_mark)
        if not what:
            await _remember(target, marked, row["mark"])
            continue
        with asking("target", f"marking {table.name} to be copied again"):
            if await target.execute(_COPY_AGAIN, table.oid, row["file_mark"], what) != "UPDATE 1":
                continue
        run.reporter.warning(
            f"{table.name} {what}: its rows' values are not in the stream, and it is copied once more at the cutover, in the downtime "
            f"({format_bytes(table.size_bytes)})"
        )


async def _remember(target: asyncpg.Connection, table: TableInfo, mark: str | None) -> None:
    """Keep what names the table's columns have come to have."""
    if mark and table.file_mark and (known := remember(mark, table.file_mark)) != mark:
        with asking("target", f"noting the columns of {table.name}"):
            await target.execute(_REMEMBER, table.oid, mark, known)
