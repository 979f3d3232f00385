"""Which chunks are to be copied anew, why, and from where on: rows of the plan, written by lanes and the coordinator."""

from __future__ import annotations

from collections.abc import Mapping

import asyncpg

from live_migration.common.home import Home

NOT_KNOWN_YET = 2**63 - 1
"""An LSN behind all others."""

_MARK = """
    insert into _live_migration.tables
        (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind, hypertable_oid, root_schema,
         root_name, copies_to_root, snapshot, horizon, timeline, rebuild, rebuild_lsn, unseen_lsn)
    select $1, $2, $3, h.lane, h.publication, h.columns, h.binary_copy, 'ready', 'chunk', h.oid, h.root_schema, h.root_name,
           true, h.snapshot, h.horizon, h.timeline, $4, $5, $6
    from _live_migration.tables h where h.kind = 'hypertable' and not h.is_left_out and h.schema_name = $7 and h.table_name = $8
    on conflict (schema_name, table_name) do update
    set rebuild = coalesce(tables.rebuild, excluded.rebuild), unseen_lsn = coalesce(excluded.unseen_lsn, tables.unseen_lsn),
        rebuild_lsn = case when tables.rebuild is null then excluded.rebuild_lsn else tables.rebuild_lsn end
"""


async def mark_chunk(
    target: asyncpg.Connection, oid: int, home: Home, *, reason: str, lsn: int | None = None, is_new: bool = False
) -> None:
    """Say that a chunk is to be copied anew by its lane: what was missed of it was before `lsn`.

    `is_new`: it was made after the plan, so all before `lsn` must have been applied first.
    """
    await target.execute(
        _MARK,
        oid,
        home.chunk.schema,
        home.chunk.name,
        reason,
        lsn if is_new else None,
        lsn,
        home.hypertable.schema,
        home.hypertable.name,
    )


async def is_marking(target: asyncpg.Connection) -> bool:
    """Tell whether chunks are marked from a position on that is not known: whoever marked them did not get to the end."""
    return bool(
        await target.fetchval("select exists (select from _live_migration.tables where unseen_lsn = $1)", NOT_KNOWN_YET)
    )


async def set_marks(target: asyncpg.Connection, lsn: int) -> None:
    """Say that what was missed of the chunks marked so far was before `lsn`."""
    await target.execute(
        """update _live_migration.tables
           set unseen_lsn = $2, rebuild_lsn = case when rebuild_lsn = $1 then $2 else rebuild_lsn end where unseen_lsn = $1""",
        NOT_KNOWN_YET,
        lsn,
    )


async def note_suspects(target: asyncpg.Connection, suspects: Mapping[int, Home]) -> None:
    """Take note of chunks that were compressed, in the transaction that applies it: the coordinator has them copied anew."""
    await target.executemany(
        "insert into _live_migration.suspects values ($1, $2, $3, $4, $5) on conflict do nothing",
        [
            (oid, home.chunk.schema, home.chunk.name, home.hypertable.schema, home.hypertable.name)
            for oid, home in suspects.items()
        ],
    )
