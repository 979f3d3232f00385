"""What follows the last barrier, step by step, each recorded when it is done: what is not in the stream, then the rest of the schema."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from live_migration.common.catalog import TableInfo, sequence_positions
from live_migration.common.errors import TargetError
from live_migration.common.postgres import asking, enter_replica_role
from live_migration.common.progress import format_bytes
from live_migration.common.relation import QualifiedName, ReplicaIdentity, quote_identifier
from live_migration.common.timescale import is_hypertable
from live_migration.consumer.copy_stream import CopyPlan, stream_copy
from live_migration.coordinator import steps
from live_migration.coordinator.aggregate_refresh import refresh_aggregates
from live_migration.coordinator.changed_definitions import follow_definitions
from live_migration.coordinator.dropped import forget_dropped_keys
from live_migration.coordinator.entries import run_entries
from live_migration.coordinator.made_jobs import make_jobs
from live_migration.coordinator.materialized_views import refresh_materialized_views
from live_migration.coordinator.rewrites import mark_rewritten
from live_migration.coordinator.run import Run
from live_migration.coordinator.schema import read_post_data
from live_migration.coordinator.source_jobs import note_starts
from live_migration.coordinator.statistics import mark_unfollowed
from live_migration.coordinator.timescale_handover import (
    bring_watermarks,
    compress_like_source,
    copy_unfollowed_chunks,
    note_compression,
    release_jobs,
)
from live_migration.producer.publication import identity_without_full

_OBJECT_BATCH = 64
_OBJECT_CHUNK = 128 << 10
_NOT_VALID_ON_PARTITIONED = 180_000
_REFERENCED = """
    select n.nspname::text, c.relname::text
    from pg_constraint k join pg_class c on c.oid = k.confrelid join pg_namespace n on n.oid = c.relnamespace
    where k.conrelid = to_regclass($1) and k.conname = $2 and k.contype = 'f'
"""
_EVENT_TRIGGERS = """
    select evtname::text, case evtenabled when 'A' then 'enable always' else 'enable' end from pg_event_trigger e
    where evtenabled in ('O', 'A') and pg_has_role(evtowner, 'usage') and not exists (
        select from pg_depend d where d.classid = 'pg_event_trigger'::regclass and d.objid = e.oid and d.deptype = 'e')
"""
"""Event triggers that may refuse an ALTER TABLE, and that our role may disable; no extension's."""


async def hand_over(run: Run, source: asyncpg.Connection) -> None:
    """Bring everything that lanes do not carry; afterwards the target is complete but for the validation of foreign keys."""
    await _once(run, "unlogged tables", lambda: copy_outside_stream(run, source))
    await _once(run, "large objects", lambda: copy_large_objects(run, source))
    await _once(run, "sequences", lambda: set_sequences(run, source))
    post_data = await read_post_data(run)
    run.reporter.note(f"restoring the rest of the schema: {len(post_data.main) + len(post_data.last)} objects")
    await run_entries(run, "post-data", post_data.main)
    await _once(run, "dropped foreign keys", lambda: forget_dropped_keys(run, source))
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
    await run_entries(run, "post-data last", post_data.last)  # event triggers: after all else that they would fire for


async def finish_after_handover(run: Run) -> None:
    """Validate the foreign keys, compress, start the jobs and gather statistics, while the target is in use already.

    The source is asked for nothing: it may be switched off by now.
    """
    await _once(run, "validation of foreign keys", lambda: validate_foreign_keys(run))
    await _once(run, "refreshed aggregates", lambda: refresh_aggregates(run))
    await _once(run, "compression", lambda: compress_like_source(run))
    await _once(run, "jobs", lambda: release_jobs(run))
    await _once(run, "analyze", lambda: _analyze(run))


async def is_finished(target: asyncpg.Connection) -> bool:
    """Tell whether nothing is left to do after the handover."""
    return await steps.is_done(target, "analyze")


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
    run.reporter.note(f"copying {table.name} ({format_bytes(table.size_bytes)}), which the stream does not carry")
    async with run.target_transaction(f"copying {table.name}") as target:
        # The target may be partitioned otherwise or have indexes of its own by now, but no trigger of the source's.
        await enter_replica_role(target)
        plan = CopyPlan(table.name, tuple(column.name for column in table.copied_columns), table.is_binary_safe)
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
    """Set each sequence of the target to where the source's is."""
    with asking("source", "reading sequences"):
        positions = [some async for some in sequence_positions(source)]
    for some in positions:
        values = [(name.sql, last_value, is_called) for name, last_value, is_called in some]
        async with run.target_transaction("setting sequences") as target:
            await target.executemany("select setval($1::text::regclass, $2, $3)", values)


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A foreign key of the plan; `statement` is pg_dump's."""

    oid: int
    table: QualifiedName
    name: str
    statement: str
    is_partitioned: bool
    is_valid: bool

    def add_statement(self, target_version: int) -> str:
        """Give the statement that adds it without looking at the rows, where that is allowed."""
        statement = self.statement.rstrip().removesuffix(";")
        is_plain = not self.is_valid or (self.is_partitioned and target_version < _NOT_VALID_ON_PARTITIONED)
        return statement if is_plain else f"{statement} NOT VALID"

    @property
    def validate_statement(self) -> str:
        """Give the statement that looks at the rows."""
        return f"alter table {self.table.sql} validate constraint {quote_identifier(self.name)}"


async def _read_foreign_keys(run: Run, *states: str) -> list[ForeignKey]:
    with asking("target", "reading the plan"):
        rows = await run.target.fetch(
            """select oid, schema_name, table_name, name, statement, is_partitioned, is_valid
               from _live_migration.foreign_keys where state = any($1::text[]) order by oid""",
            list(states),
        )
    return [
        ForeignKey(
            row["oid"],
            QualifiedName(row["schema_name"], row["table_name"]),
            row["name"],
            row["statement"],
            row["is_partitioned"],
            row["is_valid"],
        )
        for row in rows
    ]


async def add_foreign_keys(run: Run) -> None:
    """Add the foreign keys, not valid yet where that is possible; each in a transaction of its own.

    One that can only be added valid, and does not hold, is named and left out.
    """
    version = await run.target.fetchval("select current_setting('server_version_num')::int")
    for key in await _read_foreign_keys(run, "pending"):
        statement = key.add_statement(version)
        try:
            async with run.target_transaction(f"adding foreign key {key.name} of {key.table}") as target:
                await target.execute(statement)
                await target.execute("update _live_migration.foreign_keys set state = 'added' where oid = $1", key.oid)
        except TargetError as error:
            if not isinstance(error.__cause__, asyncpg.ForeignKeyViolationError):
                raise
            run.reporter.warning(
                f"rows on the target violate a foreign key, as on the source, and it is left out: {error.message}. "
                f"Mend the rows, then add it: {statement}"
            )
            async with run.target_transaction(f"leaving foreign key {key.name} of {key.table} out") as target:
                await target.execute("update _live_migration.foreign_keys set state = 'failed' where oid = $1", key.oid)


async def run_late_statements(run: Run) -> None:
    """Make the triggers, rules and policies of tables that came after the plan; each in a transaction of its own."""
    with asking("target", "reading the plan"):
        rows = await run.target.fetch(
            "select id, label, statement from _live_migration.late_statements where not is_done order by id"
        )
    for row in rows:
        async with run.target_transaction(f"making {row['label']}") as target:
            await target.execute("set local check_function_bodies = off")
            await target.execute(row["statement"])
            await target.execute("update _live_migration.late_statements set is_done = true where id = $1", row["id"])


async def validate_foreign_keys(run: Run) -> None:
    """Validate the foreign keys that were valid on the source; one that does not hold is named and left not valid."""
    for key in await _read_foreign_keys(run, "added"):
        state = "valid"
        if key.is_valid and await _is_to_hypertable(run.target, key):
            state = await _add_anew(run, key)  # validated, the keys to its chunks would stay as they are
        elif key.is_valid:
            try:
                with asking("target", f"validating foreign key {key.name} of {key.table}"):
                    async with run.target.transaction(), _event_triggers_off(run.target, key):
                        await run.target.execute(key.validate_statement)
            except TargetError as error:
                if isinstance(error.__cause__, asyncpg.FeatureNotSupportedError):
                    state = await _add_anew(run, key)
                elif isinstance(error.__cause__, asyncpg.IntegrityConstraintViolationError):
                    run.reporter.warning(f"rows on the target violate a foreign key, as on the source: {error.message}")
                    state = "failed"
                else:
                    raise
        with asking("target", "recording a foreign key"):
            await run.target.execute(
                "update _live_migration.foreign_keys set state = $2 where oid = $1", key.oid, state
            )


@asynccontextmanager
async def _event_triggers_off(target: asyncpg.Connection, key: ForeignKey) -> AsyncIterator[None]:
    """Silence event triggers in the caller's transaction: the source's are in force by now, and may refuse an ALTER TABLE.

    TimescaleDB's own, by which a key's state is handed to chunks, would be silent in the replica role, too.
    """
    if not await is_hypertable(target, key.table) and not await _is_to_hypertable(target, key):
        await enter_replica_role(target)
        yield
        return
    triggers = [tuple(row) for row in await target.fetch(_EVENT_TRIGGERS)]
    for name, _ in triggers:
        await target.execute(f"alter event trigger {quote_identifier(name)} disable")
    yield
    for name, as_before in triggers:
        await target.execute(f"alter event trigger {quote_identifier(name)} {as_before}")


async def _is_to_hypertable(target: asyncpg.Connection, key: ForeignKey) -> bool:
    with asking("target", f"looking at foreign key {key.name} of {key.table}"):
        row = await target.fetchrow(_REFERENCED, key.table.sql, key.name)
        return row is not None and await is_hypertable(target, QualifiedName(*row))


async def _add_anew(run: Run, key: ForeignKey) -> str:
    """Make a foreign key valid that cannot be validated, as those of hypertables with compression; give its state then."""
    try:
        doing = f"validating foreign key {key.name} of {key.table}"
        async with run.target_transaction(doing) as target, _event_triggers_off(target, key):
            await target.execute(f"alter table {key.table.sql} drop constraint {quote_identifier(key.name)}")
            await target.execute(key.statement)
    except TargetError as error:
        if not isinstance(error.__cause__, asyncpg.IntegrityConstraintViolationError):
            raise
        run.reporter.warning(f"rows on the target violate a foreign key, as on the source: {error.message}")
        return "failed"
    return "valid"


async def _analyze(run: Run) -> None:
    run.reporter.note("gathering statistics on the target (ANALYZE)")
    with asking("target", "ANALYZE"):
        await run.target.execute("analyze")
