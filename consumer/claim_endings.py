"""The statements that end a claim: the work is done, or given back.

Each asks once more, in the transaction of the work itself and under a row lock, whether owner and attempt are still the same;
where not, nothing of the work may be committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.errors import Fenced, LiveMigrationError
from live_migration.consumer.claims import Claim, IndexClaim, PartClaim, TableClaim
from live_migration.consumer.copy_stream import CopyCount
from live_migration.consumer.parts import BlockRange
from live_migration.consumer.sessions import Backend

_FREE = "owner = null, backend_pid = null, backend_start = null, lease_until = null"
_FREE_SOURCE = f"{_FREE}, source_pid = null, source_start = null"

_STATE_AFTER_COPY = """case when exists (select from _live_migration.indexes i where i.table_oid = t.oid and i.state <> 'done')
                            then 'copied' else 'ready' end"""

_FINISH_TABLE = f"""
    update _live_migration.tables t
    set state = {_STATE_AFTER_COPY}, snapshot = $4, horizon = $5, columns = $6, binary_copy = $7, row_count = $8, byte_count = $9,
        timeline = $10, rebuild = coalesce($11, t.rebuild), file_mark = $12, copied_at = clock_timestamp(), error = null, hint = null, {_FREE_SOURCE}
    where oid = $1 and attempt = $2 and owner = $3 and state = 'copying'
"""

_LOCK_GROUP = """
    select count(*) from (
        select from _live_migration.tables t join unnest($1::oid[], $2::int[]) as h (oid, attempt) on t.oid = h.oid and t.attempt = h.attempt
        where t.owner = $3 and t.state = 'copying' order by t.oid for no key update of t) held
"""

_FINISH_GROUP_INDEXES = f"""
    update _live_migration.indexes set state = 'done', error = null, retry_at = null, {_FREE}
    where oid = any($1::oid[]) and state = 'pending'
"""

_FINISH_GROUP = f"""
    update _live_migration.tables t
    set state = {_STATE_AFTER_COPY}, snapshot = $4, horizon = $5, timeline = $6, columns = h.columns::jsonb, binary_copy = h.is_binary,
        row_count = h.rows, byte_count = h.bytes, file_mark = h.file_mark, copied_at = clock_timestamp(), error = null, hint = null, {_FREE_SOURCE}
    from unnest($1::oid[], $2::int[], $7::text[], $8::bool[], $9::bigint[], $10::bigint[], $11::text[])
        as h (oid, attempt, columns, is_binary, rows, bytes, file_mark)
    where t.oid = h.oid and t.attempt = h.attempt and t.owner = $3 and t.state = 'copying'
"""

_GIVE_GROUP_BACK = f"""
    update _live_migration.tables t
    set state = 'planned', retry_at = clock_timestamp() + make_interval(secs => $3), {_FREE_SOURCE}
    from unnest($1::oid[], $2::int[]) as h (oid, attempt)
    where t.oid = h.oid and t.attempt = h.attempt and t.state = 'copying'
"""

_SHARE_SNAPSHOT = """
    update _live_migration.tables t
    set snapshot = $4, horizon = $5, columns = $6, binary_copy = $7, snapshot_id = $8, timeline = $9, file_mark = $10, error = null, hint = null
    where oid = $1 and attempt = $2 and owner = $3 and state = 'copying'
"""

_INSERT_PARTS = """
    insert into _live_migration.parts (oid, part, attempt, first_block, end_block, size_bytes)
    select $1, part, $2, first_block, end_block, size_bytes
    from unnest($3::int[], $4::bigint[], $5::bigint[], $6::bigint[]) as u (part, first_block, end_block, size_bytes)
"""

_FINISH_PART = f"""
    with current as (
        select oid, attempt from _live_migration.tables where oid = $1 and attempt = $2 and state = 'copying' for share
    )
    update _live_migration.parts p set state = 'done', row_count = $5, byte_count = $6, {_FREE_SOURCE}
    from current c
    where p.oid = c.oid and p.attempt = c.attempt and p.part = $4 and p.owner = $3 and p.state = 'copying'
"""

_FINISH_SHARED_TABLE = f"""
    update _live_migration.tables t
    set state = {_STATE_AFTER_COPY}, snapshot_id = null, copied_at = clock_timestamp(), error = null, hint = null, {_FREE_SOURCE},
        (row_count, byte_count) = (select coalesce(sum(p.row_count), 0), coalesce(sum(p.byte_count), 0)
                                   from _live_migration.parts p where p.oid = t.oid)
    where oid = $1 and attempt = $2 and owner = $3 and state = 'copying'
      and not exists (select from _live_migration.parts p
                      where p.oid = t.oid and (p.state <> 'done' or p.attempt <> t.attempt))
"""


@dataclass(frozen=True, slots=True)
class CopyOrigin:
    """What a table's copy saw, for the visibility rule, and the shape it had. `columns` is JSON."""

    snapshot: str | None
    horizon: int | None
    timeline: int | None
    columns: str
    is_binary: bool
    rebuild: str | None = None
    """Why a chunk's lane has to copy it anew: it has no snapshot then."""
    file_mark: str | None = None


async def finish_table(
    connection: asyncpg.Connection, claim: TableClaim, owner: str, origin: CopyOrigin, count: CopyCount
) -> None:
    """Mark a table copied, in the transaction that holds its rows. Raises Fenced when the claim is not ours any more."""
    status = await connection.execute(
        _FINISH_TABLE,
        claim.oid,
        claim.attempt,
        owner,
        origin.snapshot,
        origin.horizon,
        origin.columns,
        origin.is_binary,
        count.rows,
        count.bytes,
        origin.timeline,
        origin.rebuild,
        origin.file_mark,
    )
    _require_one(status, claim)


@dataclass(frozen=True, slots=True)
class CopiedTable:
    """A table of a group: what its copy saw, and how much it was."""

    claim: TableClaim
    origin: CopyOrigin
    count: CopyCount


async def lock_group(connection: asyncpg.Connection, claims: Sequence[TableClaim], owner: str) -> None:
    """Lock the rows of claims that end together, in the one order for that, until the transaction's end.

    Raises:
        Fenced: one of the claims is not ours any more.
    """
    keys = ([claim.oid for claim in claims], [claim.attempt for claim in claims], owner)
    if await connection.fetchval(_LOCK_GROUP, *keys) != len(claims):
        raise Fenced(f"{claims[0]} and {len(claims) - 1} more: the claim of one was taken over by somebody else")


async def finish_group(
    connection: asyncpg.Connection, copied: Sequence[CopiedTable], owner: str, built_indexes: Sequence[int]
) -> None:
    """Mark tables copied and these of their indexes built, in the transaction that holds rows and indexes of all of them.

    All have the first one's snapshot. Their rows are locked already, by `lock_group`.

    Raises:
        Fenced: one of the claims is not ours any more.
    """
    claims = [each.claim for each in copied]
    keys = ([claim.oid for claim in claims], [claim.attempt for claim in claims], owner)
    what = f"{claims[0]} and {len(claims) - 1} more"
    if built_indexes:
        status = await connection.execute(_FINISH_GROUP_INDEXES, built_indexes)
        if status != f"UPDATE {len(built_indexes)}":
            raise Fenced(f"{what}: an index was claimed by somebody else")
    origin = copied[0].origin
    status = await connection.execute(
        _FINISH_GROUP,
        *keys,
        origin.snapshot,
        origin.horizon,
        origin.timeline,
        [each.origin.columns for each in copied],
        [each.origin.is_binary for each in copied],
        [each.count.rows for each in copied],
        [each.count.bytes for each in copied],
        [each.origin.file_mark for each in copied],
    )
    if status != f"UPDATE {len(claims)}":
        raise Fenced(f"{what}: the claim of one was taken over by somebody else")


async def give_group_back(connection: asyncpg.Connection, claims: Sequence[TableClaim], delay: float) -> int:
    """End the attempts that are still current; each of these tables is copied alone after `delay` seconds. Gives their number."""
    keys = [claim.oid for claim in claims], [claim.attempt for claim in claims]
    status: str = await connection.execute(_GIVE_GROUP_BACK, *keys, delay)
    return int(status.removeprefix("UPDATE "))


async def share_snapshot(
    connection: asyncpg.Connection,
    claim: TableClaim,
    owner: str,
    origin: CopyOrigin,
    snapshot_id: str,
    ranges: Sequence[BlockRange],
) -> None:
    """Hand out a table's parts, in the transaction that empties it. Raises Fenced when the claim is not ours any more."""
    status = await connection.execute(
        _SHARE_SNAPSHOT,
        claim.oid,
        claim.attempt,
        owner,
        origin.snapshot,
        origin.horizon,
        origin.columns,
        origin.is_binary,
        snapshot_id,
        origin.timeline,
        origin.file_mark,
    )
    _require_one(status, claim)
    await connection.execute("delete from _live_migration.parts where oid = $1", claim.oid)
    await connection.execute(
        _INSERT_PARTS,
        claim.oid,
        claim.attempt,
        list(range(len(ranges))),
        [blocks.first for blocks in ranges],
        [blocks.end for blocks in ranges],
        [blocks.size_bytes for blocks in ranges],
    )


async def finish_part(connection: asyncpg.Connection, claim: PartClaim, owner: str, count: CopyCount) -> None:
    """Mark a part done, in the transaction that holds its rows. Raises Fenced when part or attempt are not ours any more."""
    status = await connection.execute(
        _FINISH_PART, claim.oid, claim.attempt, owner, claim.part, count.rows, count.bytes
    )
    _require_one(status, claim)


async def finish_shared_table(connection: asyncpg.Connection, claim: TableClaim, owner: str) -> bool:
    """Mark a table copied if all its parts are done, and tell whether that was so."""
    status: str = await connection.execute(_FINISH_SHARED_TABLE, claim.oid, claim.attempt, owner)
    return status == "UPDATE 1"


async def finish_index(connection: asyncpg.Connection, claim: IndexClaim, owner: str) -> None:
    """Mark an index done, in the transaction that made it; its table is ready with the last one.

    The table's row is locked first: of two that finish together, the second sees the first.

    Raises:
        Fenced: the claim is not ours any more.
    """
    await connection.execute("select 1 from _live_migration.tables where oid = $1 for update", claim.table_oid)
    status = await connection.execute(
        f"""update _live_migration.indexes set state = 'done', error = null, retry_at = null, {_FREE}
            where oid = $1 and owner = $2 and state = 'building'""",
        claim.oid,
        owner,
    )
    _require_one(status, claim)
    await connection.execute(
        """update _live_migration.tables t set state = 'ready'
           where oid = $1 and state = 'copied'
             and not exists (select from _live_migration.indexes i where i.table_oid = t.oid and i.state <> 'done')""",
        claim.table_oid,
    )


def _require_one(status: str, claim: Claim) -> None:
    if status != "UPDATE 1":
        raise Fenced(f"{claim}: the claim was taken over by somebody else")


async def give_table_back(
    connection: asyncpg.Connection, claim: TableClaim | PartClaim, delay: float, *, error: str | None, hint: str | None
) -> bool:
    """End a table's attempt, the holder's or, from a part, another's: nothing of it counts, and it begins anew after `delay` seconds.

    With an error the table is 'stopped' meanwhile. Tells whether that is news: the attempt was still the current one, and the
    table did not show the same error before.
    """
    earlier = await connection.fetchrow(
        f"""update _live_migration.tables t
            set state = $3, retry_at = clock_timestamp() + make_interval(secs => $4), snapshot_id = null,
                error = coalesce($5, t.error), hint = coalesce($6, t.hint), {_FREE_SOURCE}
            from (select oid, error from _live_migration.tables where oid = $1) before
            where t.oid = before.oid and attempt = $2 and state = 'copying'
            returning before.error""",
        claim.oid,
        claim.attempt,
        "stopped" if error else "planned",
        delay,
        error,
        hint,
    )
    return earlier is not None and (error is None or earlier["error"] != error)


async def show_error(connection: asyncpg.Connection, claim: PartClaim, error: LiveMigrationError) -> None:
    """Show with a table why one of its parts cannot be copied just now; its other parts go on."""
    await connection.execute(
        "update _live_migration.tables set error = $3, hint = $4 where oid = $1 and attempt = $2 and state = 'copying'",
        claim.oid,
        claim.attempt,
        error.message,
        error.hint,
    )


async def give_part_back(connection: asyncpg.Connection, claim: PartClaim, owner: str) -> None:
    """Let others copy the part."""
    await connection.execute(
        f"""update _live_migration.parts set state = 'pending', row_count = 0, byte_count = 0, {_FREE_SOURCE}
            where oid = $1 and attempt = $2 and part = $3 and owner = $4 and state = 'copying'""",
        claim.oid,
        claim.attempt,
        claim.part,
        owner,
    )


async def give_index_back(
    connection: asyncpg.Connection, claim: IndexClaim, owner: str, delay: float, error: str | None
) -> None:
    """Let others make the index after `delay` seconds; `error` says why it could not be made."""
    await connection.execute(
        f"""update _live_migration.indexes
            set state = 'pending', error = $3, retry_at = clock_timestamp() + make_interval(secs => $4), {_FREE}
            where oid = $1 and owner = $2 and state = 'building'""",
        claim.oid,
        owner,
        error,
        delay,
    )


async def copying_backends(connection: asyncpg.Connection, oid: int) -> list[Backend]:
    """Give the target backends that are at parts of a table, of whatever attempt."""
    rows = await connection.fetch(
        """select backend_pid, backend_start from _live_migration.parts
           where oid = $1 and state = 'copying' and backend_pid is not null""",
        oid,
    )
    return [Backend(row["backend_pid"], row["backend_start"]) for row in rows]
