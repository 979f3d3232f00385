"""Tables that lose their replica identity leave the first publication at once, for UPDATE and DELETE fail on them now."""

from __future__ import annotations

import asyncio
import time

import asyncpg

from live_migration.common.errors import KafkaAway, SourceError
from live_migration.common.postgres import asking
from live_migration.common.state import Phase
from live_migration.coordinator.beside import beside
from live_migration.coordinator.planning import GENERATED_IN_FULL
from live_migration.coordinator.run import Run
from live_migration.producer.publication import (
    PublishedTable,
    move_table,
    published_tables,
    tables_without_identity,
)

_INTERVAL_SECONDS = 1.0
_SHARE = 10
"""The pause after a look is at least so many times what the look took: with many thousand tables that is not nothing to the source."""


async def watch_identities(run: Run, may_tell: asyncio.Event | None = None) -> None:
    """Look each second, or less often where that takes long; never returns.

    The producer is told beside it, for writers of the source wait for no broker. `may_tell`: set once it may be; None: at once.
    """
    moved = asyncio.Event()
    await beside(_look_on(run, moved), [_tell(run, moved, may_tell)])


async def _look_on(run: Run, moved: asyncio.Event) -> None:
    async with run.source_session("identities") as source, run.target_session("identities") as target:
        while True:
            began = time.monotonic()
            has_lost, has_moved = await _move_all(run, source, target)
            if has_moved:
                moved.set()
            pause = 0.0 if has_lost else _SHARE * (time.monotonic() - began)
            await asyncio.sleep(max(_INTERVAL_SECONDS, pause))


async def _tell(run: Run, moved: asyncio.Event, may_tell: asyncio.Event | None) -> None:
    """Tell the producer of what was moved, again until the broker takes it; never returns."""
    async with run.target_session("identities told") as target:
        while True:
            await moved.wait()
            if may_tell is not None:
                await may_tell.wait()
            moved.clear()
            try:
                await run.publications_changed(target)
            except KafkaAway as error:
                moved.set()
                told = f"the producer cannot be told yet that a table has lost its replica identity: {error.message}"
                run.reporter.warn_on_change("identities told", told)
                await asyncio.sleep(_INTERVAL_SECONDS)
            else:
                run.reporter.warn_on_change("identities told", "")


async def move_lost(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> bool:
    """Move each table that has lost its identity into the publication of inserts, record and announce it; tell whether there was one."""
    has_lost, has_moved = await _move_all(run, source, target)
    if has_moved:
        await run.publications_changed(target)
    return has_lost


async def _move_all(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> tuple[bool, bool]:
    """Move and record them; tell whether there was one, and whether the producer is to be told.

    Its walsender looks at the publications anew then; rows are not lost meanwhile, for the source let no UPDATE or DELETE through while
    the table was published without an identity. In phase prepare nobody reads the change log yet.
    """
    refuses_generated = run.migration.source_version >= GENERATED_IN_FULL
    with asking("source", "looking at replica identities"):
        lost = await tables_without_identity(source, run.settings.publication, refuses_generated=refuses_generated)
    moved = [table for table in lost if await _move(run, source, target, table)]
    return bool(lost), bool(moved) and run.phase is not Phase.PREPARE


async def _move(run: Run, source: asyncpg.Connection, target: asyncpg.Connection, table: PublishedTable) -> bool:
    # Recorded first: should we die in between, the table is copied once too often rather than not at all.
    with asking("target", f"recording that {table.name} lost its replica identity"):
        status = await target.execute(
            """update _live_migration.tables
               set publication = 'insert', copy_again = true,
                   error = 'has lost its replica identity on the source: UPDATE and DELETE are not followed any more',
                   hint = 'It is copied again at the cutover; keep that in mind if it is big.'
               where oid = $1""",
            table.oid,
        )
    try:
        await move_table(
            source,
            table,
            run.settings.publication,
            run.settings.insert_publication,
            lock_timeout=run.settings.lock_timeout,
            patience=0,  # the next look comes in a moment, and others have lost theirs, too
        )
    except SourceError as error:
        run.reporter.warn_on_change(f"identity {table.oid}", f"{table.name} has lost its replica identity: {error}")
        return False
    run.reporter.warning(
        f"{table.name} has lost its replica identity on the source; it was taken out of publication "
        f"{run.settings.publication} so that UPDATE and DELETE on it succeed. From now on only INSERT and TRUNCATE on it "
        f"are followed{'' if status == 'UPDATE 0' else ', and it is copied once more at the cutover'}."
    )
    return True


async def reconcile(run: Run, source: asyncpg.Connection) -> None:
    """Mark tables that were moved while the plan was being saved: the mark and the plan's row missed each other then."""
    with asking("source", "reading the publications"):
        members = list(await published_tables(source, run.settings.insert_publication))
    with asking("target", "comparing the plan with the publications"):
        await run.target.execute(
            """update _live_migration.tables set publication = 'insert', copy_again = true
               where publication = 'all' and oid = any($1::oid[])""",
            members,
        )
