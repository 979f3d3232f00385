"""Copying many small tables at once: one lock, one snapshot, one flush and one transaction for all of them, their indexes included.

Each table by itself costs some thirty statements and a flushed commit on either side, whatever its rows take. What is particular in
any of them (another shape, a lock, a refused index) ends the group, or leaves that table out of it: it is then copied alone,
which has the words and the patience for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from live_migration.common.errors import Fenced, LiveMigrationError, Retry
from live_migration.common.postgres import terminate_backend
from live_migration.common.relation import QualifiedName
from live_migration.common.rewriting import FILE_MARK
from live_migration.common.state import record_event
from live_migration.common.telemetry import get_logger
from live_migration.consumer.claim_endings import CopiedTable, CopyOrigin, finish_group, give_group_back, lock_group
from live_migration.consumer.claims import TableClaim
from live_migration.consumer.committing import await_applied
from live_migration.consumer.copy_context import CopyContext
from live_migration.consumer.copy_errors import CopyDeferred, CopyEnded, server_errors
from live_migration.consumer.copy_stream import CopyCount, CopyPlan, stream_copy
from live_migration.consumer.copy_transactions import begin_on_target, end_on_source
from live_migration.consumer.lease_keeper import Lease
from live_migration.consumer.sessions import CopySession, SessionPair
from live_migration.consumer.table_shape import find_differences
from live_migration.consumer.table_snapshot import (
    MOMENT,
    LockedTable,
    begin_locked,
    plan_copy,
    read_all_definitions,
    require_known_timeline,
)

_MOST_BYTES = 1 << 20
"""What a table may have become since it was planned, TOAST and all."""
_LOCK_TIMEOUT_SECONDS = 2.0
"""For any lock on the target: the group gives up soon, and whoever waits does so alone."""

_UNDER_LOCK = f"""
    select c.oid, n.nspname, c.relname, c.relkind::text as kind, pg_relation_size(c.oid) as size_bytes,
           pg_table_size(c.oid) <= $2 as is_small, coalesce(m.amname = 'heap', false) as is_heap,
           c.oid = any(array(select l.relation from pg_locks l
                             where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.granted and l.mode = 'AccessShareLock'
                               and l.database = (select d.oid from pg_database d where d.datname = current_database()))) as is_locked,
           current_setting('block_size')::int as block_size, {FILE_MARK} as file_mark
    from pg_class c join pg_namespace n on n.oid = c.relnamespace left join pg_am m on m.oid = c.relam
    where c.oid = any($1::oid[])
"""
_ON_TARGET = """
    select u.source, c.oid, pg_relation_size(c.oid) = 0 as is_empty
    from unnest($1::oid[], $2::text[]) as u (source, name) join pg_class c on c.oid = to_regclass(u.name)::oid
    where c.relkind = 'r'
"""
_INDEXES = """
    select oid, statements from _live_migration.indexes
    where table_oid = any($1::oid[]) and state = 'pending'
    order by is_primary desc, is_unique desc, oid
"""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Member:
    """A table that the group can take. `is_empty`: neither side has a row; `is_there_empty`: the target has none."""

    lease: Lease[TableClaim]
    plan: CopyPlan
    origin: CopyOrigin
    is_empty: bool
    is_there_empty: bool


async def copy_group_or_set_back(
    context: CopyContext,
    group: Sequence[Lease[TableClaim]],
    pair: SessionPair,
    source: CopySession,
    target: CopySession,
) -> None:
    """Copy small tables, or give back those that are to be copied alone; drops the leases.

    Raises:
        LiveMigrationError: what ends the consumer.
    """
    try:
        with context.watch.watching(source.backend.pid, group[0], _name(group)):
            await group[0].interrupt.guard(_copy(context, group, source, target))
    except LiveMigrationError as error:
        pair.discard()
        await _set_back(context, group, error, target)
    finally:
        for lease in group:
            context.keeper.drop(lease)


async def _copy(
    context: CopyContext, group: Sequence[Lease[TableClaim]], source: CopySession, target: CopySession
) -> None:
    name = _name(group)
    members = await _look(context, group, source, target)
    await context.watch.flush_barrier()
    filled = [member.plan.name.sql for member in members if not member.is_there_empty]
    empty = [f"truncate only {', only '.join(filled)}"] if filled else []
    await begin_on_target(target, name, *empty, lock_timeout=_LOCK_TIMEOUT_SECONDS)
    copied = [
        CopiedTable(member.lease.claim, member.origin, await _copy_one(member, source, target)) for member in members
    ]
    await end_on_source(source, name)
    built = await _build_indexes(copied, target)
    taken = {member.lease.claim.oid for member in members}
    left = [lease.claim for lease in group if lease.claim.oid not in taken]
    for lease in group:
        lease.is_finishing = True
    with server_errors("target", f"finishing {name}"):
        await lock_group(target.connection, [lease.claim for lease in group], context.owner)
        if copied:
            await finish_group(target.connection, copied, context.owner, built)
        if left:
            await give_group_back(target.connection, left, 0.0)
        await target.connection.execute("commit")
    rows, byte_count = sum(each.count.rows for each in copied), sum(each.count.bytes for each in copied)
    log.info("tables copied", tables=len(copied), first=name, rows=rows, bytes=byte_count, left_out=len(left))
    context.bell.ring()


async def _build_indexes(copied: Sequence[CopiedTable], target: CopySession) -> list[int]:
    """Build the tables' indexes in the transaction of their rows, and give their oids: nobody claims them before it ends."""
    with server_errors("target", "building the indexes of small tables"):
        indexes = await target.connection.fetch(_INDEXES, [each.claim.oid for each in copied])
        if indexes:
            await target.connection.execute("\n;\n".join(each for row in indexes for each in row["statements"]))
    return [row["oid"] for row in indexes]


async def _look(
    context: CopyContext, group: Sequence[Lease[TableClaim]], source: CopySession, target: CopySession
) -> list[_Member]:
    """Lock the tables, take the snapshot, and give those that are as planned, small, and of the same shape on the target."""
    claims = [lease.claim for lease in group]
    relations = ", only ".join(claim.name.sql for claim in claims)
    with server_errors("source", f"looking at {_name(group)}"):
        await await_applied(source.connection, target.connection, _name(group))
    await begin_locked(source.connection, claims[0].name, context.settings.lock_timeout, f"only {relations}")
    oids = [claim.oid for claim in claims]
    with server_errors("source", f"looking at {_name(group)}"):
        moment = await source.connection.fetchrow(MOMENT)
        seen = {row["oid"]: row for row in await source.connection.fetch(_UNDER_LOCK, oids, _MOST_BYTES)}
        ours = await read_all_definitions(source.connection, oids)
    await require_known_timeline(target.connection, claims[0].name, moment["timeline"])
    with server_errors("target", f"looking at {_name(group)}"):
        names = [claim.name.sql for claim in claims]
        there = {row["source"]: row for row in await target.connection.fetch(_ON_TARGET, oids, names)}
        theirs = await read_all_definitions(target.connection, [row["oid"] for row in there.values()])
    members = []
    for lease in group:
        claim = lease.claim
        row, twin = seen.get(claim.oid), there.get(claim.oid)
        if row is None or twin is None or not row["is_locked"] or not row["is_small"] or row["kind"] != "r":
            continue
        if QualifiedName(row["nspname"], row["relname"]) != claim.name:
            continue
        here, its = ours.get(claim.oid, ()), theirs.get(twin["oid"], ())
        if find_differences(here, its):
            continue
        table = LockedTable(
            claim.name,
            **dict(moment),
            **{k: row[k] for k in ("size_bytes", "is_heap", "block_size", "file_mark")},
            columns=here,
        )
        # No transaction that the snapshot sees has written into a file without a block; our lock keeps it from being cut.
        has_none = table.is_heap and table.size_bytes == 0
        plan, origin = plan_copy(table, its, None)
        members.append(_Member(lease, plan, origin, has_none, twin["is_empty"]))
    return members


async def _copy_one(member: _Member, source: CopySession, target: CopySession) -> CopyCount:
    if member.is_empty:
        return CopyCount(0, 0)
    return await stream_copy(
        source.connection,
        target.connection,
        member.plan,
        blocks=None,
        freeze=not member.is_there_empty,
        on_bytes=member.lease.progress,
    )


async def _set_back(
    context: CopyContext, group: Sequence[Lease[TableClaim]], error: LiveMigrationError, target: CopySession
) -> None:
    """Write down that nothing was copied; the session on the target is ended first, as it may wait for a lock, or be at its commit."""
    if error.retry is Retry.STOP and not isinstance(error, Fenced):
        raise error
    is_news = isinstance(error, CopyDeferred) and error.is_news
    is_over = is_news or isinstance(error, CopyEnded)
    delay = context.settings.lock_timeout * random.uniform(0.5, 1.5) if is_news else 0.0
    async with context.control.use(f"giving {_name(group)} back") as connection:
        await terminate_backend(connection, target.backend.pid, target.backend.started)
        count = await give_group_back(connection, [lease.claim for lease in group], delay)
        if count and is_news:
            await record_event(connection, "warning", error.message)
    log.info("tables set back", tables=count, alone=not is_over, reason=error.message)
    context.bell.ring()


def _name(group: Sequence[Lease[TableClaim]]) -> str:
    return f"{group[0].claim} and {len(group) - 1} more"
