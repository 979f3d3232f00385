"""A planned table that somebody took out of our publications is published again and copied again.

What was changed in between is in no stream, and from when on nobody knows. While the table is out, and until it is copied, the target keeps
what it had. A publication that is gone or altered is a loss like that of the slot (`losses`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import asyncpg

from live_migration.common.errors import ConnectionLost, PublicationLost, SourceError
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.state import Phase
from live_migration.coordinator import steps
from live_migration.coordinator.losses import tables_to_copy
from live_migration.coordinator.memberships import find_left, require_publications
from live_migration.coordinator.planning import Memberships
from live_migration.coordinator.prepare import publish_tables
from live_migration.coordinator.recopy import (
    FENCE_LANES,
    FORGET_COPY,
    FREE_INDEXES,
    LOCK_TABLES,
    adopt_memberships,
    end_work,
)
from live_migration.coordinator.run import Run
from live_migration.coordinator.statistics import read_statistics
from live_migration.producer.publication import remove_tables
from live_migration.producer.slot import SlotTimeout, await_older_transactions

INTERVAL_SECONDS = 10.0
_PHASES = (Phase.COPY, Phase.REPLAY, Phase.CUTOVER)

_MARK = "update _live_migration.tables set is_unpublished = true where oid = any($1::oid[])"
_COPY_AGAIN = f"""
    update _live_migration.tables set state = 'planned', {FORGET_COPY}
    where is_unpublished and kind = 'table' and oid = any($1::oid[])
    returning schema_name || '.' || table_name as name
"""
_REBUILD_AGAIN = """
    update _live_migration.tables set rebuild = coalesce(rebuild, 'it had left the publication')
    where is_unpublished and kind = 'hypertable' and oid = any($1::oid[])
    returning schema_name || '.' || table_name as name
"""


class PublicationChanged(ConnectionLost):
    """A table has left our publications: the migration is to be led anew, which publishes and copies it again."""


async def watch_publications(run: Run) -> None:
    """Compare the publications with the plan now and then; returns once the target has passed the last barrier.

    Raises:
        PublicationLost: one is gone or was altered.
        PublicationChanged: tables have left them.
    """
    async with run.source_session("publications") as source, run.target_session("publications") as target:
        while True:
            try:
                await require_publications(run, source, target)
                left = await find_left(run, source, target)
            except PublicationLost as error:
                if await steps.has_passed_barrier(target):
                    return
                raise PublicationLost(f"{error.message}; {await tables_to_copy(target)}", hint=error.hint) from error
            if left and not await steps.has_passed_barrier(target):
                raise PublicationChanged(f"{name_list(map(str, left))}: not published any more, or not all of it")
            await asyncio.sleep(INTERVAL_SECONDS)


async def publish_again(run: Run) -> None:
    """Publish again what has left the publications, and have it copied again, for which the migration goes back to phase `copy`.

    Raises:
        PublicationChanged | LockTimeout: somebody stands in the way for now; the migration is to be led anew.
    """
    if run.phase not in _PHASES or await steps.has_passed_barrier(run.target):
        return
    async with run.source_session("publications") as source:
        left = await find_left(run, source, run.target)
        # First the mark, for what is published again looks afterwards as if nothing had been missed.
        async with run.target_transaction("noting what has left the publications") as target:
            await target.execute(_MARK, [each.table.oid for each in left if each.kind != "chunk"])
            marked = {
                row[0] for row in await target.fetch("select oid from _live_migration.tables where is_unpublished")
            }
        # A chunk that is in none is found, published and copied anew by whoever watches chunks.
        try:
            await _take_out(run, source, {each.table.oid for each in left})
        except SourceError as error:
            if not isinstance(error.__cause__, asyncpg.UndefinedObjectError):
                raise
            raise PublicationChanged(error.message) from error  # moved meanwhile by whoever watches identities
        if not marked:
            return
        members = await publish_tables(run, source, only=frozenset(marked))
        try:
            await await_older_transactions(
                source, timeout=run.settings.slot_timeout, on_wait=run.reporter.note, what="publishing tables again"
            )
        except SlotTimeout as error:  # the marks are kept
            raise PublicationChanged(error.message) from error
        statistics = await read_statistics(source)
    await run.publications_changed(run.target)
    await end_work(run.target)  # a stopped consumer keeps its locks on the rows that we are to change
    names = await _copy_again(run, members, statistics)
    run.reporter.warning(
        f"somebody has taken tables out of our publications, or published them by a row filter or column list: {name_list(names)}. What was "
        "changed there meanwhile is not in the stream: they are published and copied again"
    )


async def _take_out(run: Run, source: asyncpg.Connection, oids: Collection[int]) -> None:
    settings = run.settings
    for name in (settings.publication, settings.insert_publication):
        await remove_tables(source, name, oids, lock_timeout=settings.lock_timeout)


async def _copy_again(run: Run, members: Memberships, statistics: str | None) -> list[str]:
    """Forget the copies of all that is marked and published again, and take the marks away."""
    oids = [table.oid for table in (*members.all, *members.insert)]
    async with run.target_transaction("having tables copied again") as target:
        await target.execute(LOCK_TABLES)
        rebuilt = await target.fetch(_REBUILD_AGAIN, oids)
        rows = await target.fetch(_COPY_AGAIN, oids)
        await adopt_memberships(target, members, statistics)
        # A lane that goes on must ask the new snapshot, and one that sleeps must not wake up with the old one.
        await target.execute(FENCE_LANES)
        await target.execute("delete from _live_migration.parts where oid = any($1::oid[])", oids)
        await target.execute(FREE_INDEXES)
        await target.execute("update _live_migration.tables set is_unpublished = false where is_unpublished")
        if rows and run.phase is not Phase.COPY:
            await run.enter(Phase.COPY)
    with asking("target", "reading the migration's state"):
        await run.reload()
    return sorted(row["name"] for row in (*rows, *rebuilt))
