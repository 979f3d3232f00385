"""`migrate --recopy`: what was lost with slot or change log is brought by copying every table again, under the schema that is there.

One transaction voids all that was copied and applied, fences whoever is still at work, and goes back to phase `prepare`, which
makes slot, publications and topics anew, as after any attempt that broke off. So each step can be repeated after a crash.
"""

from __future__ import annotations

from uuid import uuid4

import asyncpg

from live_migration.common.errors import LiveMigrationError
from live_migration.common.postgres import asking, terminate_backend
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName, quote_identifier
from live_migration.common.state import Phase
from live_migration.coordinator import steps
from live_migration.coordinator.losses import find_loss
from live_migration.coordinator.made_definitions import load_made
from live_migration.coordinator.ownership import read_claim, require_our_topics, require_ours_on_source
from live_migration.coordinator.planning import Memberships
from live_migration.coordinator.run import Run
from live_migration.coordinator.timescale_catalog import POST_RESTORE

_STEP = "recopy"
FREE = "owner = null, backend_pid = null, backend_start = null, lease_until = null"
FORGET_COPY = f"""attempt = attempt + 1, retry_at = null, snapshot_id = null, snapshot = null, horizon = null, timeline = null,
        row_count = 0, byte_count = 0, copied_at = null, error = null, hint = null, source_pid = null, source_start = null, {FREE}"""
"""What becomes of a table's row when its copy counts no more: whoever is at it still can end nothing."""

LOCK_TABLES = "select 1 from _live_migration.tables order by oid for no key update"
"""In the order of those who end the copies of several at once: neither waits for a row of the other's."""

FREE_INDEXES = f"""
    update _live_migration.indexes i
    set state = 'pending', retry_at = null, {FREE}
    from _live_migration.tables t where t.oid = i.table_oid and t.state = 'planned' and i.state = 'building'
"""

FENCE_LANES = """
    update _live_migration.checkpoints
    set epoch = epoch + 1, owner = null, backend_pid = null, backend_start = null
"""

# Chunks that lanes took for gone tell of a log that counts no more, and of a source that may be another now: they are met anew.
# Not 'planned', which a consumer that sleeps through the change of phase could claim before there is a slot.
VOID = f"""
    {LOCK_TABLES};
    delete from _live_migration.tables where newcomer = 'gone' and kind = 'chunk' and hypertable_oid is null;
    update _live_migration.tables
    set state = 'stopped', started_at = null, copy_again = false, is_passed_over = false, is_unpublished = false, {FORGET_COPY}
    where kind <> 'hypertable' and newcomer is distinct from 'gone';
    update _live_migration.tables
    set newcomer = 'made', rebuild = 'every table is copied again', rebuild_lsn = null, snapshot = null, horizon = null, timeline = null
    where kind = 'hypertable' and newcomer = 'followed';
    delete from _live_migration.parts;
    update _live_migration.indexes set state = 'pending', error = null, retry_at = null, {FREE} where state = 'building';
    update _live_migration.checkpoints
    set next_offset = 0, commit_lsn = '0/0', ordinal = 0, barrier = null, arrived_lsn = null, epoch = epoch + 1, owner = null, backend_pid = null,
        backend_start = null, change_count = 0, byte_count = 0, commit_time = null, updated_at = null, error = null, hint = null,
        refused = null;
    delete from _live_migration.skips;
    update _live_migration.requests set handled_at = clock_timestamp(), result = 'refused: every table is copied again'
    where handled_at is null;
    update _live_migration.steps set is_done = false where name = 'prepare';
    insert into _live_migration.steps (name) values ('{_STEP}') on conflict (name) do update set is_done = false
"""

RELEASE = """
    update _live_migration.tables set state = 'planned', attempt = attempt + 1
    where kind <> 'hypertable' and newcomer is distinct from 'gone' and not (kind = 'chunk' and state = 'ready')
"""
"""Chunks that are ready were marked since, for their lanes to copy (`recopy_chunks`)."""

_INDEX_AGAIN = """
    update _live_migration.tables t set state = 'copied' where kind = 'hypertable' and state = 'ready'
      and exists (select from _live_migration.indexes i where i.table_oid = t.oid and i.state <> 'done')
"""

_PLAIN = """
    select schema_name, table_name from _live_migration.tables
    where kind = 'hypertable' and not is_left_out and newcomer is distinct from 'gone'
"""

_BACKENDS = """
    select backend_pid, backend_start from _live_migration.tables where backend_pid is not null
    union select backend_pid, backend_start from _live_migration.parts where backend_pid is not null
    union select backend_pid, backend_start from _live_migration.indexes where backend_pid is not null
    union select backend_pid, backend_start from _live_migration.checkpoints where backend_pid is not null
"""

_BUILT = """
    select i.oid, t.schema_name, t.table_name, t.kind, i.name, x.indexrelid is not null as exists,
           k.conname::text as constraint_name, coalesce(c.relispartition, false) as is_attached
    from _live_migration.indexes i
    join _live_migration.tables t on t.oid = i.table_oid
    left join pg_namespace n on n.nspname = t.schema_name
    left join pg_class r on r.relnamespace = n.oid and r.relname = t.table_name
    left join pg_class c on c.relnamespace = n.oid and c.relname = i.name and c.relkind = 'i'
    left join pg_index x on x.indexrelid = c.oid and x.indrelid = r.oid
    left join pg_constraint k on k.conindid = x.indexrelid and k.conrelid = x.indrelid and k.contype in ('p', 'u', 'x')
    where i.state = 'done'
    order by i.is_primary, i.oid
"""


async def begin_recopy(run: Run) -> None:
    """Void what was copied and go back to phase `prepare`, or go on with a recopy that broke off.

    Raises:
        LiveMigrationError: nothing is lost, and the stream carries all; or the target holds everything already.
    """
    is_past = run.phase is Phase.DONE or await steps.has_passed_barrier(run.target)
    with asking("target", "reading the migration's state"):
        has_begun = await is_under_way(run.target)
    if is_past:
        raise LiveMigrationError(
            "the target has passed the last barrier and holds every change: nothing is to be copied again",
            hint="Run `live-migration migrate` to end the migration, and `live-migration verify` to compare both sides.",
        )
    if run.phase is Phase.PREPARE:
        return  # nothing was read of what prepare makes: it is made anew
    loss = await find_loss(run) or await _find_uncarried(run)
    if loss is None and not has_begun:
        raise LiveMigrationError(
            "slot and change log are whole: nothing needs to be copied again",
            hint="Run `live-migration migrate` to go on.",
        )
    if loss is not None:
        await _require_ours(run)
        run.reporter.warning(f"every table is copied again: {loss.message}")
        await _void(run)


async def _find_uncarried(run: Run) -> LiveMigrationError | None:
    """Give the error of columns that came since the form of the stream was chosen, and that it cannot carry: it is chosen anew with the copy."""
    if not run.migration.binary_stream:
        return None
    async with run.source_session("recopy") as source:
        tables = await run.list_tables(source)
    with asking("target", "reading the plan"):
        planned = {row["oid"] for row in await run.target.fetch("select oid from _live_migration.tables")}
    found = [table.name for table in tables if table.oid in planned and not table.is_binary_safe]
    return LiveMigrationError(f"the stream's binary form cannot carry columns of {name_list(found)}") if found else None


async def _require_ours(run: Run) -> None:
    """Refuse where what is to be made anew is another migration's, before anything is forgotten."""
    claim = await read_claim(run.target)
    async with run.source_session("recopy") as source:
        await require_ours_on_source(source, run.settings, claim)
    await require_our_topics(run.settings, claim)


async def takes_rows(target: asyncpg.Connection) -> bool:
    """Tell whether hypertables that came over as they are take rows by now: then the target has chunks of its own (`recopy_chunks`)."""
    return await steps.is_done(target, POST_RESTORE)


async def is_under_way(target: asyncpg.Connection) -> bool:
    """Tell whether everything is to be copied again, and phase `copy` has not begun yet."""
    return await target.fetchval(f"select not is_done from _live_migration.steps where name = '{_STEP}'") or False


async def _void(run: Run) -> None:
    """Fence everybody and forget what was copied. Whoever wakes up later hits no row: attempts and epochs were raised."""
    await end_work(run.target)  # a stopped consumer keeps its locks on the rows that we are to change
    async with run.target_transaction("voiding what was copied") as target:
        await target.execute(VOID)
        await target.execute(
            """update _live_migration.migration set topic_id = $2, start_lsn = null, cutover_lsn = null, binary_stream = null
               where epoch = $1""",
            run.epoch,
            uuid4(),
        )
        await run.enter(Phase.PREPARE)
    await run.reload()


async def end_work(target: asyncpg.Connection) -> None:
    """End the target sessions of all that is claimed: copies, index builds, lanes."""
    with asking("target", "ending the consumers' sessions"):
        for row in await target.fetch(_BACKENDS):
            await terminate_backend(target, row["backend_pid"], row["backend_start"])


async def drop_built_indexes(run: Run) -> None:
    """Drop the indexes and constraints that were built, where a recopy is under way; consumers build them again after the copy.

    A COPY into a table without indexes and a build from sorted rows is what the first copy does, and several times faster
    than inserting each row into each index. One that is attached to a partitioned index, or that something depends on, cannot
    go by itself: it is kept, and filled while the table is copied. So are those of hypertables that take rows.
    """
    if not await is_under_way(run.target):
        return
    with asking("target", "looking at the indexes"):
        rows = await run.target.fetch(_BUILT)
        keeps_hypertables = await takes_rows(run.target)
    for row in rows:
        if row["is_attached"] or (keeps_hypertables and row["kind"] != "table"):
            continue
        async with run.target_transaction(f"dropping index {row['name']}") as target:
            if row["exists"] and not await _drop(target, row):
                run.reporter.note(f"index {row['name']} is kept, for something depends on it")
                continue
            await target.execute("update _live_migration.indexes set state = 'pending' where oid = $1", row["oid"])


async def _drop(target: asyncpg.Connection, row: asyncpg.Record) -> bool:
    table = QualifiedName(row["schema_name"], row["table_name"])
    if row["constraint_name"]:
        statement = f"alter table {table.sql} drop constraint {quote_identifier(row['constraint_name'])}"
    else:
        statement = f"drop index {QualifiedName(table.schema, row['name']).sql}"
    try:
        async with target.transaction():
            await target.execute(statement)
    except asyncpg.DependentObjectsStillExistError:
        return False
    return True


async def planned_tables(target: asyncpg.Connection) -> frozenset[int] | None:
    """Give the source's oids of the planned tables, None before there is a plan."""
    rows = await target.fetch("select oid from _live_migration.tables")
    return frozenset(row["oid"] for row in rows) or None


async def adopt_memberships(target: asyncpg.Connection, members: Memberships, statistics: str | None) -> None:
    """Bring a plan that is there up to date with the publications just made: what is followed, and from which count on."""
    for publication, tables in (("all", members.all), ("insert", members.insert)):
        await target.executemany(
            "update _live_migration.tables set publication = $2, changed_row_count = $3, statistics = $4 where oid = $1",
            [(table.oid, publication, table.changed_row_count, statistics) for table in tables],
        )


async def _empty_plain(target: asyncpg.Connection) -> None:
    for row in await target.fetch(_PLAIN):
        await target.execute(f"truncate only {QualifiedName(row['schema_name'], row['table_name']).sql}")


async def release_tables(run: Run) -> None:
    """Let consumers copy, where a recopy is under way; inside the transaction that enters phase `copy`.

    The attempt rises once more: nobody can have begun since the tables were voided, and nobody who did may end. Plain tables that were
    hypertables are emptied here, for their chunks are copied beside one another.
    """
    if await is_under_way(run.target):
        made = await load_made(run.target)
        if made is not None and made.is_flat:
            await _empty_plain(run.target)
        await run.target.execute(RELEASE)
        await run.target.execute(_INDEX_AGAIN)
        await steps.finish(run.target, run.epoch, _STEP)
