"""Tables, hypertables and continuous aggregates that were made on the source after the plan: brought to the target while lanes apply.

Each goes through two transactions on the target, so that a coordinator that dies goes on where it was:

    made        the table is on the target, empty; nothing of it is published for its sake yet
    followed    it is published, every transaction that may have missed that has ended, the producer has been told; its row has a
                snapshot of the source from after that. Its lane copies it whole, then applies what the copy does not show.

One that cannot be made is not published (a change in the stream would stop its lane) and is named; the cutover is refused while it is there.
What becomes a hypertable on its way here, as CREATE TABLE and create_hypertable in two transactions do it, is made anew as one. TimescaleDB refuses
that for a published table: so no plain table is published that has not been there for two looks, but at the cutover.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.catalog import TableInfo, list_tables
from live_migration.common.errors import SourceError
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.common.state import Phase
from live_migration.common.timescale import read_layout, read_version
from live_migration.coordinator import client_programs, planning, steps
from live_migration.coordinator.barrier import emit_call
from live_migration.coordinator.drift import PARENTS
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.identity_watch import move_lost
from live_migration.coordinator.made_definitions import load_made
from live_migration.coordinator.newcomer_jobs import bring_jobs
from live_migration.coordinator.newcomer_leaving import KNOWN, changed_kinds, let_go, unmake
from live_migration.coordinator.newcomer_making import Newcomer, NewcomerRefused, leave_out, make_newcomer
from live_migration.coordinator.planning import Moment
from live_migration.coordinator.prepare import publish_compressed
from live_migration.coordinator.run import Run
from live_migration.coordinator.schema import MOMENT
from live_migration.producer.publication import LockTimeout, PublishedTable, add_tables, published_tables
from live_migration.producer.slot import SlotTimeout, await_older_transactions

INTERVAL_SECONDS = 10.0
PATIENCE_SECONDS = 5.0
"""For a lock on the source: whoever else follows what came, the cutover too, waits for us meanwhile."""
_ORDER = ("table", "hypertable", "aggregate")

_FOLLOW = """
    update _live_migration.tables
    set newcomer = 'followed', publication = $2, columns = $3, binary_copy = $4, row_estimate = $5, size_bytes = $6,
        changed_row_count = $7, snapshot = $8, horizon = $9, timeline = $10, statistics = $11
    where oid = $1 and newcomer = 'made'
"""

# A lane can have taken them for gone, wrongly: what the hypertable's copy shows of them would be applied once more.
_MEET_ANEW = """
    delete from _live_migration.tables t using unnest($1::oid[], $2::text[], $3::text[]) as c (oid, schema_name, table_name)
    where t.newcomer = 'gone' and t.kind = 'chunk' and (t.oid = c.oid or (t.schema_name, t.table_name) = (c.schema_name, c.table_name))
"""


class Passing(str):
    """A reason that passes by itself, for which something cannot be brought yet: a lock that somebody holds, a transaction that is open."""

    __slots__ = ()


async def watch_newcomers(run: Run) -> None:
    """Bring newcomers now and then while lanes apply; never returns."""
    async with run.source_session("newcomers") as source:
        seen: set[int] = set()
        while True:
            # Not before: in phase copy, TimescaleDB's catalog on the target is not its own yet.
            problems = await bring_newcomers(run, source, phases=(Phase.REPLAY,), seen=seen)
            for name, reason in problems.items():
                run.reporter.warn_on_change(
                    f"newcomer {name}", f"{name}, made on the source, cannot be brought: {reason}"
                )
            await asyncio.sleep(INTERVAL_SECONDS)


async def bring_newcomers(
    run: Run, source: asyncpg.Connection, *, phases: Sequence[Phase] = tuple(Phase), seen: set[int] | None = None
) -> dict[str, str]:
    """Bring what was made on the source since the last look, let go of what is gone; give what could not be brought, and why.

    In other `phases` than these it does nothing: what it writes into the WAL between two barriers would look like a write.

    Args:
        run: of the coordinator.
        source: a session of the caller's.
        phases: see above.
        seen: plain tables of the last looks, to be kept by the caller: where the source has TimescaleDB, one is brought that is among them. None: at once.
    """
    # A session that began in TimescaleDB's restoring mode knows none of its statements ever after.
    async with run.following, run.target_session("newcomers") as target:
        if run.phase not in phases:
            return {}
        tables = await run.list_tables(source)
        await let_go(run, source, target, tables)
        problems, has_changed = await _bring(run, source, target, tables, seen)
        if has_changed:  # into hypertables, which they remain
            tables = await run.list_tables(source)
            # What is found now, among it what was found just before, has been there for one look.
            again, _ = await _bring(run, source, target, tables, None if seen is None else set())
            problems |= again
        return problems | await bring_jobs(run, source, target)


async def _bring(
    run: Run,
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    tables: Sequence[TableInfo],
    seen: set[int] | None,
) -> tuple[dict[str, str], bool]:
    """Make and follow newcomers; give what could not be brought, and whether some are to be made anew, of another kind."""
    with asking("target", "reading the plan"):
        known = await target.fetch(KNOWN)
    newcomers, problems = await _find(run, source, known, tables)
    if seen is not None and await _has_timescale(source):
        newcomers = _settled(newcomers, seen)
    if newcomers:
        problems |= await _make(run, source, target, newcomers)
    with asking("target", "reading the plan"):
        waiting = {row["oid"] for row in await target.fetch(KNOWN) if row["newcomer"] == "made"}
    if not waiting:
        return problems, False
    more, has_changed = await _follow(run, source, target, waiting)
    return problems | more, has_changed


async def _has_timescale(source: asyncpg.Connection) -> bool:
    with asking("source", "looking at its extensions"):
        return await read_version(source) is not None


def _settled(newcomers: Sequence[Newcomer], seen: set[int]) -> list[Newcomer]:
    """Give those that may be brought now, and note the plain tables that were `seen`. Pure but for that.

    A plain table may be on its way to become a hypertable, which TimescaleDB refuses once it is published.
    """
    plain = {each.table.oid for each in newcomers if each.kind == "table"}
    found = [each for each in newcomers if each.table.oid not in plain - seen]
    seen.clear()
    seen.update(plain)
    return found


async def _make(
    run: Run, source: asyncpg.Connection, target: asyncpg.Connection, newcomers: Sequence[Newcomer]
) -> dict[str, str]:
    problems = {}
    programs = await client_programs.find(run.settings, run.migration.source_version // 10_000)
    made = await load_made(target)
    is_flat = made is not None and made.is_flat
    for newcomer in newcomers:
        if is_flat and newcomer.kind == "aggregate":
            await leave_out(run, target, newcomer)
            continue
        try:
            if await make_newcomer(run, programs, source, target, newcomer, is_flat=is_flat):
                run.reporter.note(f"{newcomer.kind} {newcomer.name}, made on the source, is on the target now")
        except NewcomerRefused as error:
            problems[str(newcomer.name)] = str(error)
    return problems


async def _find(
    run: Run, source: asyncpg.Connection, known: Sequence[asyncpg.Record], tables: Sequence[TableInfo]
) -> tuple[list[Newcomer], dict[str, str]]:
    """Give the tables that are not in the plan, in the order in which they can be made, and those that cannot."""
    oids = {row["oid"] for row in known}
    found = [table for table in tables if table.is_users and planning.is_followed(table) and table.oid not in oids]
    if not found:
        return [], {}
    with asking("source", "looking at new tables"):
        partitions = {row["oid"] for row in await source.fetch(PARENTS)}
    layout = await run.patiently("reading the hypertables", lambda: read_layout(source))
    definitions = await run.patiently("reading the hypertables", lambda: read_definitions(source))
    views = {oid: each.view for oid, each in layout.hypertables.items()} if layout else {}
    aggregates = [each.name for each in definitions.aggregates] if definitions else []
    taken = {QualifiedName(row["schema_name"], row["table_name"]) for row in known}
    newcomers, problems = [], {}
    for table in found:
        view = views.get(table.oid)
        if table.oid in partitions:
            problems[str(table.name)] = (
                "it is a partition of a partitioned table. Move its rows into a partition of before and drop it, or `clean` and "
                "start again"
            )
        elif table.name in taken:
            problems[str(table.name)] = (
                "a table of that name was planned, and is another one. Drop it, or `clean` and start again"
            )
        elif view is not None:
            newcomers.append(Newcomer(table, "aggregate", view))
        else:
            newcomers.append(Newcomer(table, "hypertable" if table.part == "hypertable" else "table", table.name))
    ranks = {name: rank for rank, name in enumerate(aggregates)}  # parents first
    newcomers.sort(key=lambda each: (_ORDER.index(each.kind), ranks.get(each.name, 0), each.table.oid))
    return newcomers, problems


async def _follow(
    run: Run, source: asyncpg.Connection, target: asyncpg.Connection, oids: set[int]
) -> tuple[dict[str, str], bool]:
    """Publish tables that were made on the target, wait, tell the producer, and have their lanes copy them.

    Gives what could not be followed, and why; and whether some have become tables of another kind, and so were unmade.
    """
    tables = await run.list_tables(source)
    before: set[int] = set()
    try:
        before = await _unmake_changed(run, source, target, tables)
        oids = oids - before
        if not oids:
            return {}, bool(before)
        await _publish(run, source, target, tables, oids)
        await await_older_transactions(
            source, timeout=run.settings.slot_timeout, on_wait=run.reporter.note, what="publishing new tables"
        )
    except (SlotTimeout, LockTimeout) as error:
        return {name_list(table.name for table in tables if table.oid in oids): Passing(error.message)}, bool(before)
    except SourceError as error:
        if not isinstance(error.__cause__, asyncpg.UndefinedTableError | asyncpg.InvalidSchemaNameError):
            raise
        return {}, bool(before)  # dropped or renamed just now; the next look finds what is left
    await run.publications_changed(target)
    published = await _look_behind(run, source)
    try:
        after = await _unmake_changed(run, source, target, published.tables)
    except LockTimeout as error:
        return {name_list(table.name for table in tables if table.oid in oids): Passing(error.message)}, bool(before)
    names = await _save(run, target, oids - after, published)
    if names:
        # It also brings every lane past where the newcomers begin.
        await emit_call(source, str(run.migration.id))
        run.reporter.note(f"{name_list(names)}: followed from now on, what they hold is copied")
    return {}, bool(before or after)


async def _unmake_changed(
    run: Run, source: asyncpg.Connection, target: asyncpg.Connection, tables: Sequence[TableInfo]
) -> set[int]:
    """Unmake those that were made on the target as another kind of table than they are by now; give them."""
    with asking("target", "reading the plan"):
        known = await target.fetch(KNOWN)
    changed = changed_kinds(known, tables)
    if changed:
        await unmake(run, source, target, changed, tables, patience=PATIENCE_SECONDS)
    return {table.oid for table in changed}


async def _publish(
    run: Run, source: asyncpg.Connection, target: asyncpg.Connection, tables: Sequence[TableInfo], oids: set[int]
) -> None:
    settings = run.settings
    wanted = [table for table in tables if table.oid in oids or (table.part == "chunk" and table.hypertable in oids)]
    members = planning.assign(wanted, run.migration.source_version)
    with asking("source", "reading the publications"):
        present = {
            **await published_tables(source, settings.publication),
            **await published_tables(source, settings.insert_publication),
        }
    for publication, group in ((settings.publication, members.all), (settings.insert_publication, members.insert)):
        missing = [PublishedTable(table.oid, table.name) for table in group if table.oid not in present]
        await add_tables(source, publication, missing, lock_timeout=settings.lock_timeout, patience=PATIENCE_SECONDS)
    await move_lost(run, source, target)  # at once: an identity may have been lost between looking and publishing
    await publish_compressed(run, source, target, tables, patience=PATIENCE_SECONDS)
    if without := [table.name for table in members.insert if table.oid in oids]:
        run.reporter.warning(
            f"{name_list(without)}: no usable replica identity; only INSERT and TRUNCATE are followed, and the table is copied once more at "
            "the cutover where rows were updated or deleted"
        )


@dataclass(frozen=True, slots=True)
class _Published:
    """What one snapshot of the source showed after new tables were published: its moment, all tables, and the publications."""

    moment: Moment
    tables: Sequence[TableInfo]
    in_all: Container[int]
    in_insert: Container[int]


async def _look_behind(run: Run, source: asyncpg.Connection) -> _Published:
    async def look() -> _Published:
        async with source.transaction(isolation="repeatable_read", readonly=True):
            return _Published(
                Moment(**dict(await source.fetchrow(MOMENT))),
                await list_tables(source),
                await published_tables(source, run.settings.publication),
                await published_tables(source, run.settings.insert_publication),
            )

    return await run.patiently("reading the moment", look)


async def _save(run: Run, target: asyncpg.Connection, oids: set[int], published: _Published) -> list[QualifiedName]:
    """Record of each published table the moment from which on the stream holds all of its changes."""
    moment, in_all, in_insert = published.moment, published.in_all, published.in_insert
    tables = [table for table in published.tables if table.oid in oids]
    tables = [table for table in tables if table.oid in in_all or table.oid in in_insert]
    with asking("target", "saving what is followed"):
        async with target.transaction():
            for table in tables:
                await target.execute(
                    _FOLLOW,
                    table.oid,
                    "all" if table.oid in in_all else "insert",
                    planning.columns_json(table.columns),
                    table.is_binary_safe,
                    table.row_estimate,
                    table.size_bytes,
                    table.changed_row_count,
                    moment.snapshot,
                    moment.horizon,
                    moment.timeline,
                    moment.statistics,
                )
            await _meet_anew(target, published.tables, {table.oid for table in tables})
            await steps.require_role(target, run.epoch)
    return [table.name for table in tables]


async def _meet_anew(target: asyncpg.Connection, tables: Sequence[TableInfo], followed: Container[int]) -> None:
    """Forget chunks of followed hypertables that are there and were taken for gone; their lane meets them as those of others."""
    chunks = [table for table in tables if table.part == "chunk" and table.hypertable in followed]
    await target.execute(
        _MEET_ANEW,
        [chunk.oid for chunk in chunks],
        [chunk.name.schema for chunk in chunks],
        [chunk.name.name for chunk in chunks],
    )
