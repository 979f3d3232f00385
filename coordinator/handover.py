"""What follows the last barrier, step by step, each recorded when it is done: what is not in the stream, then the rest of the schema."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import asyncpg

from live_migration.common.catalog import (
    SequenceParameters,
    TableInfo,
    list_sequences,
    read_columns,
    sequence_parameters,
    sequence_positions,
)
from live_migration.common.errors import TargetError
from live_migration.common.postgres import asking, enter_replica_role
from live_migration.common.progress import format_bytes, name_list
from live_migration.common.relation import QualifiedName, ReplicaIdentity
from live_migration.common.timescale import is_hypertable
from live_migration.consumer.copy_stream import CopyPlan, stream_copy
from live_migration.coordinator import steps
from live_migration.coordinator.aggregate_refresh import refresh_aggregates
from live_migration.coordinator.changed_definitions import follow_definitions
from live_migration.coordinator.entries import UNFIT, run_entries
from live_migration.coordinator.foreign_keys import add_foreign_keys, follow_foreign_keys, validate_foreign_keys
from live_migration.coordinator.made_jobs import make_jobs
from live_migration.coordinator.materialized_views import refresh_materialized_views
from live_migration.coordinator.post_data import PostData
from live_migration.coordinator.rewrites import mark_rewritten
from live_migration.coordinator.run import Run
from live_migration.coordinator.schema import read_post_data
from live_migration.coordinator.source_changes import fix_late_changes, make_late_changes
from live_migration.coordinator.source_jobs import held_target_jobs, note_starts
from live_migration.coordinator.statistics import mark_unfollowed
from live_migration.coordinator.target_blockers import naming_blockers
from live_migration.coordinator.timescale_handover import (
    bring_watermarks,
    compress_like_source,
    copy_unfollowed_chunks,
    note_compression,
    release_jobs,
)
from live_migration.producer.publication import identity_without_full

_SET_SEQUENCE = "select setval($1::text::regclass, $2, $3)"
_AFTER = {
    "validation of foreign keys": "foreign keys to be validated",
    "refreshed aggregates": "continuous aggregates to be refreshed",
    "analyze": "statistics (ANALYZE)",
    "compression": "chunks to be compressed",
    "jobs": "jobs to be scheduled",
}
_OBJECT_BATCH = 64
_OBJECT_CHUNK = 128 << 10


async def hand_over(run: Run, source: asyncpg.Connection, post_data: PostData | None = None) -> None:
    """Bring everything that lanes do not carry; afterwards the target is complete but for the validation of foreign keys.

    `post_data`: what `read_post_data` gives, where somebody has read it already.
    """
    await _once(run, "unlogged tables", lambda: copy_outside_stream(run, source))
    await _once(run, "large objects", lambda: copy_large_objects(run, source))
    await _once(run, "sequences", lambda: set_sequences(run, source))
    post_data = post_data or await read_post_data(run)
    changes = await fix_late_changes(run, source, before="post-data")
    run.reporter.note(f"restoring the rest of the schema: {len(post_data.main) + len(post_data.last)} objects")
    await run_entries(run, "post-data", changes.to_run(post_data.main), is_late=True)
    await _once(run, "late changes", lambda: make_late_changes(run, changes))
    await _once(run, "dropped foreign keys", lambda: follow_foreign_keys(run, source))
    await _once(run, "foreign keys", lambda: add_foreign_keys(run))
    await _once(run, "triggers of newcomers", lambda: run_late_statements(run))
    await _once(run, "replica identities", lambda: take_identities_back(run))
    await _once(run, "watermarks", lambda: bring_watermarks(run, source))
    await _once(run, "changed definitions", lambda: follow_definitions(run, source))
    # Of an aggregate a view reads what its watermark says, in the mode that it is in. (The step was another one, too early, once.)
    await _once(run, "filled views", lambda: refresh_materialized_views(run, source))
    await _once(run, "noted compression", lambda: note_compression(run, source))
    await _once(run, "noted starts of jobs", lambda: note_starts(run, source))
    await make_jobs(run, source)
    await run_entries(
        run, "post-data last", post_data.last, is_late=True
    )  # event triggers: after all else that they would fire for


async def finish_after_handover(run: Run) -> None:
    """Validate the foreign keys, gather statistics, compress and start the jobs, while the target is in use already.

    The source is asked for nothing: it may be switched off by now. Who is in the way on the target is named.
    """
    await naming_blockers(run, "what follows the hand-over", _finish(run))


async def _finish(run: Run) -> None:
    await _once(run, "validation of foreign keys", lambda: validate_foreign_keys(run))
    await _once(run, "refreshed aggregates", lambda: refresh_aggregates(run))
    await _once(
        run, "analyze", lambda: _analyze(run)
    )  # users wait for it, and TimescaleDB chooses by it how to compress
    await _once(run, "compression", lambda: compress_like_source(run))
    await _once(run, "jobs", lambda: release_jobs(run))


async def is_finished(target: asyncpg.Connection) -> bool:
    """Tell whether nothing is left to do after the handover."""
    return all([await steps.is_done(target, step) for step in ("analyze", "jobs")])


async def list_unfinished(target: asyncpg.Connection) -> list[str]:
    """Give what is left to do after the handover, for people; nothing once `is_finished`."""
    if await is_finished(target):
        return []
    left = [what for step, what in _AFTER.items() if not await steps.is_done(target, step)]
    jobs = await held_target_jobs(target)
    return left + ([f"jobs that are still off: {name_list(jobs)}"] if jobs else [])


async def _once(run: Run, step: str, act: Callable[[], Awaitable[None]]) -> None:
    if await steps.is_done(run.target, step):
        return
    await act()
    async with run.target_transaction(f"ending {step}") as target:
        await steps.finish(target, run.epoch, step)


async def copy_outside_stream(run: Run, source: asyncpg.Connection) -> None:
    """Copy unlogged tables, and those whose changes were not all in the stream; each in a transaction of its own."""
    await mark_rewritten(run, source, run.target)
    unfollowed = await mark_unfollowed(run, source, await run.list_tables(source))
    with asking("target", "reading the plan"):
        again = {r[0] for r in await run.target.fetch("select oid from _live_migration.tables where copy_again")}
    for table in unfollowed.tables:
        if table.is_users and (table.persistence == "u" or table.oid in again):
            await _copy(run, source, table)
    await copy_unfollowed_chunks(run, source, unfollowed)


async def _copy(run: Run, source: asyncpg.Connection, table: TableInfo) -> None:
    with asking("target", f"looking at {table.name}"):
        oid = await run.target.fetchval("select to_regclass($1)::oid", table.name.sql)
        there = (await read_columns(run.target, [oid])).get(oid, ()) if oid else ()
    types = {column.name: column.type for column in there if not column.generated}
    left_out = [column.name for column in table.copied_columns if column.name not in types]
    if left_out and table.persistence == "p":  # it holds rows, which are to be given up for whole ones alone
        raise TargetError(
            f"{table.name} is to be copied once more, and the target lacks its columns {name_list(left_out)}, altered on the source since the last look",
            hint="Alter the target's table as the source was altered, then run `live-migration migrate` again; it goes on here.",
        )
    if oid is None or (left_out and len(left_out) == len(table.copied_columns)):
        run.reporter.warning(
            f"table {table.name}, which the stream does not carry, is left out: the target has none like it. Make it and copy its rows by hand"
        )
        return
    if left_out:
        run.reporter.warning(
            f"columns {name_list(left_out)} of {table.name}, which the stream does not carry, are left out: the target has none of that name"
        )
    run.reporter.note(f"copying {table.name} ({format_bytes(table.size_bytes)}), which the stream does not carry")
    async with run.target_transaction(f"copying {table.name}") as target:
        # The target may be partitioned otherwise or have indexes of its own by now, but no trigger of the source's.
        await enter_replica_role(target)
        names = tuple(column.name for column in table.copied_columns if column.name not in left_out)
        is_alike = all(types[column.name] == column.type for column in table.copied_columns if column.name in types)
        plan = CopyPlan(table.name, names, table.is_binary_safe and is_alike)  # another type may take the text
        with asking("target", f"emptying {table.name}"):
            only = "" if await is_hypertable(target, table.name) else "only "
            await target.execute(f"truncate {only}{table.name.sql}")
        copied = await stream_copy(source, target, plan, blocks=None, freeze=False, on_bytes=lambda _: None)
        await target.execute(
            """update _live_migration.tables set copy_again = false, is_passed_over = false, error = null, hint = null, row_count = $2
               where oid = $1""",
            table.oid,
            copied.rows,
        )


async def copy_large_objects(run: Run, source: asyncpg.Connection) -> None:
    """Copy large objects under their own oids, some at a time, in pieces."""
    step, done = "large objects", await steps.progress(run.target, "large objects")
    while True:
        with asking("source", "reading large objects"):
            rows = await source.fetch(
                """select oid, lo_get(oid, 0, $3) as content from pg_largeobject_metadata
                   where oid::bigint > $1 order by oid limit $2""",
                done,
                _OBJECT_BATCH,
                _OBJECT_CHUNK,
            )
        if not rows:
            return
        async with run.target_transaction("writing large objects") as target:
            try:
                await target.execute(
                    "select lo_from_bytea(o, b) from unnest($1::oid[], $2::bytea[]) as x (o, b)",
                    [row["oid"] for row in rows],
                    [row["content"] for row in rows],
                )
            except asyncpg.UniqueViolationError as error:
                raise TargetError(
                    "the target holds large objects with the same oids as the source's",
                    hint="Remove them from the target with lo_unlink if nobody needs them, then run `migrate` again.",
                ) from error
            for row in rows:
                if len(row["content"]) == _OBJECT_CHUNK:
                    await _copy_rest(source, target, row["oid"])
            done = rows[-1]["oid"]
            await steps.advance(target, run.epoch, step, done)


async def _copy_rest(source: asyncpg.Connection, target: asyncpg.Connection, oid: int) -> None:
    at = _OBJECT_CHUNK
    while True:
        with asking("source", f"reading large object {oid}"):
            content = await source.fetchval("select lo_get($1, $2, $3)", oid, at, _OBJECT_CHUNK)
        if content:
            await target.execute("select lo_put($1, $2, $3)", oid, at, content)
        if len(content) < _OBJECT_CHUNK:
            return
        at += len(content)


async def take_identities_back(run: Run) -> None:
    """Give tables the replica identity that they had on the source before we made it FULL: the dump has them as FULL."""
    async with run.target_transaction("taking REPLICA IDENTITY FULL back") as target:
        rows = await target.fetch(
            """select case when t.oid = c.oid then format('%I.%I', t.schema_name, t.table_name) else t.compressed_name end as name,
                      c.before
               from _live_migration.source_changes c join _live_migration.tables t on c.oid in (t.oid, t.compressed_oid)
               where c.kind = 'replica_identity' and (t.kind <> 'chunk' or not t.copies_to_root)"""
        )
        for row in rows:
            if not await target.fetchval("select to_regclass($1) is not null", row["name"]):
                continue  # a chunk that was dropped or decompressed
            identity = identity_without_full(ReplicaIdentity(row["before"]))
            await _alter_identity(target, f"alter table {row['name']} replica identity {identity}")


async def _alter_identity(target: asyncpg.Connection, statement: str) -> None:
    """Set a replica identity, also of a table of compressed rows, for which TimescaleDB refuses it before 2.29."""
    try:
        async with target.transaction():
            await target.execute(statement)
    except asyncpg.FeatureNotSupportedError:
        await target.execute(
            f"set local timescaledb.restoring = on; {statement}; set local timescaledb.restoring = off"
        )


async def set_sequences(run: Run, source: asyncpg.Connection) -> None:
    """Set each sequence of the target to where the source's is; one that was altered on the source is altered first.

    One that the target has not, made on the source since the last look at both, is named and left out: users wait.
    """
    with asking("source", "reading sequences"):
        positions = [some async for some in sequence_positions(source)]
        wanted = await sequence_parameters(source)
    with asking("target", "reading sequences"):
        present, there = await sequence_parameters(run.target), set(await list_sequences(run.target))
    if absent := [name for some in positions for name, *_ in some if name not in there]:
        run.reporter.warning(
            f"sequences that the target has not are left out: {name_list(absent)}. Make them, and set them with setval"
        )
    altered = {name for name in wanted.keys() & present.keys() if wanted[name] != present[name]}
    for batch in positions:
        some = [each for each in batch if each[0] in there]
        values = [(name.sql, last_value, is_called) for name, last_value, is_called in some if name not in altered]
        async with run.target_transaction("setting sequences") as target:
            await target.executemany(_SET_SEQUENCE, values)
        for name, last_value, is_called in some:
            if name in altered:
                await _alter_sequence(run, name, wanted[name], last_value, is_called)


async def _alter_sequence(
    run: Run, name: QualifiedName, wanted: SequenceParameters, last_value: int, is_called: bool
) -> None:
    # Where it stands must lie within the new bounds.
    statement = f"ALTER SEQUENCE {name.sql} {wanted.clauses} RESTART WITH {last_value}"
    try:
        async with run.target_transaction(f"altering sequence {name}") as target:
            await target.execute(statement)
            await target.execute(_SET_SEQUENCE, name.sql, last_value, is_called)
    except TargetError as error:
        if not isinstance(error.__cause__, asyncpg.PostgresError):
            raise
        run.reporter.warning(
            f"sequence {name}, altered on the source since the plan, is not set: {error.message}. "
            f"Do it by hand: {statement}; select setval('{name.sql}', {last_value}, {str(is_called).lower()})"
        )
    else:
        run.reporter.note(f"altered as on the source now: sequence {name}")


async def run_late_statements(run: Run) -> None:
    """Make the triggers, rules and policies of tables that came after the plan; each in a transaction of its own.

    One that the target cannot have as it is by now is named and left out.
    """
    with asking("target", "reading the plan"):
        rows = await run.target.fetch(
            "select id, label, statement from _live_migration.late_statements where not is_done order by id"
        )
    for row in rows:
        done = "update _live_migration.late_statements set is_done = true where id = $1"
        try:
            async with run.target_transaction(f"making {row['label']}") as target:
                await target.execute("set local check_function_bodies = off")
                await target.execute(row["statement"])
                await target.execute(done, row["id"])
        except TargetError as error:
            if not isinstance(error.__cause__, UNFIT):
                raise
            run.reporter.warning(f"{row['label']} is left out: {error.message}. Make it by hand: {row['statement']}")
            async with run.target_transaction(f"leaving {row['label']} out") as target:
                await target.execute(done, row["id"])


async def _analyze(run: Run) -> None:
    run.reporter.note("gathering statistics on the target (ANALYZE)")
    with asking("target", "ANALYZE"):
        await run.target.execute("analyze")
