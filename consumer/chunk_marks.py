"""Which chunks are to be copied anew, why, and from where on: rows of the plan, written by lanes and the coordinator."""

from __future__ import annotations

from collections.abc import Mapping

import asyncpg

from live_migration.common.home import Home
from live_migration.common.relation import QualifiedName

NOT_KNOWN_YET = 2**63 - 1
"""An LSN behind all others."""

_MARK = """
    insert into _live_migration.tables
        (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind, hypertable_oid, root_schema,
         root_name, copies_to_root, snapshot, horizon, timeline, rebuild, rebuild_lsn, unseen_lsn, range)
    select $1, $2, $3, h.lane, h.publication, h.columns, h.binary_copy, 'ready', 'chunk', h.oid, h.root_schema, h.root_name,
           true, h.snapshot, h.horizon, h.timeline, $4, $5, $6, $9
    from _live_migration.tables h where h.kind = 'hypertable' and not h.is_left_out and h.schema_name = $7 and h.table_name = $8
    on conflict (schema_name, table_name) do update
    set rebuild = coalesce(tables.rebuild, excluded.rebuild), unseen_lsn = greatest(excluded.unseen_lsn, tables.unseen_lsn),
        rebuild_lsn = case when tables.rebuild is null then excluded.rebuild_lsn else tables.rebuild_lsn end,
        range = coalesce(tables.range, excluded.range)
"""


async def mark_chunk(
    target: asyncpg.Connection,
    oid: int,
    home: Home,
    *,
    reason: str,
    lsn: int | None = None,
    is_new: bool = False,
    condition: str | None = None,
) -> None:
    """Say that a chunk is to be copied anew by its lane: what was missed of it was before `lsn`.

    `is_new`: it was made after the plan, so all before `lsn` must have been applied first. `condition`: its range, as read before `lsn`:
    should it have another when it is copied, it was merged or split since.
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
        condition if is_new else None,
    )


async def is_marking(target: asyncpg.Connection) -> bool:
    """Tell whether chunks are marked from a position on that is not known: whoever marked them did not get to the end."""
    return bool(
        await target.fetchval("select exists (select from _live_migration.tables where unseen_lsn = $1)", NOT_KNOWN_YET)
    )


async def is_waiting(target: asyncpg.Connection) -> bool:
    """Tell whether a marked chunk's lane has not come to where it copies it."""
    return bool(
        await target.fetchval(
            """select exists (select from _live_migration.tables t join _live_migration.checkpoints c using (lane)
                              where t.rebuild is not null and t.rebuild_lsn > c.commit_lsn and t.rebuild_lsn < $1)""",
            NOT_KNOWN_YET,
        )
    )


async def set_marks(target: asyncpg.Connection, lsn: int) -> None:
    """Say that what was missed of the chunks marked so far was before `lsn`."""
    await target.execute(
        """update _live_migration.tables
           set unseen_lsn = $2, rebuild_lsn = case when rebuild_lsn = $1 then $2 else rebuild_lsn end where unseen_lsn = $1""",
        NOT_KNOWN_YET,
        lsn,
    )


async def read_lane_suspects(target: asyncpg.Connection, lane: int) -> dict[int, Home]:
    """Give the suspects that the coordinator has not come to, of hypertables of one lane."""
    rows = await target.fetch(
        """select s.* from _live_migration.suspects s join _live_migration.tables h
               on h.kind = 'hypertable' and (h.schema_name, h.table_name) = (s.hypertable_schema, s.hypertable_name)
           where h.lane = $1""",
        lane,
    )
    return {
        row["compressed_oid"]: Home(
            QualifiedName(row["hypertable_schema"], row["hypertable_name"]),
            QualifiedName(row["chunk_schema"], row["chunk_name"]),
        )
        for row in rows
    }


async def note_suspects(target: asyncpg.Connection, suspects: Mapping[int, Home]) -> None:
    """Take note of chunks that were compressed, or decompressed unwatched, in the transaction that applies it: the coordinator has them copied anew."""
    await target.executemany(
        # A row that is noted again is another one: the coordinator, who may just be done with the first, leaves it.
        """insert into _live_migration.suspects values ($1, $2, $3, $4, $5)
           on conflict (compressed_oid) do update set chunk_name = excluded.chunk_name""",
        [
            (oid, home.chunk.schema, home.chunk.name, home.hypertable.schema, home.hypertable.name)
            for oid, home in suspects.items()
        ],
    )
