"""Tables that lose their replica identity leave the first publication at once, for UPDATE and DELETE fail on them now."""

from __future__ import annotations

import asyncio
import time

import asyncpg

from live_migration.common.errors import SourceError
from live_migration.common.postgres import asking
from live_migration.common.state import Phase
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


async def watch_identities(run: Run) -> None:
    """Look each second, or less often where that takes long; never returns."""
    async with run.source_session("identities") as source, run.target_session("identities") as target:
        while True:
            began = time.monotonic()
            has_lost = await move_lost(run, source, target)
            pause = 0.0 if has_lost else _SHARE * (time.monotonic() - began)
            await asyncio.sleep(max(_INTERVAL_SECONDS, pause))


async def move_lost(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> bool:
    """Move each table that has lost its identity into the publication of inserts, record and announce it; tell whether there was one."""
    refuses_generated = run.migration.source_version >= GENERATED_IN_FULL
    with asking("source", "looking at replica identities"):
        lost = await tables_without_identity(source, run.settings.publication, refuses_generated=refuses_generated)
    moved = [table for table in lost if await _move(run, source, target, table)]
    if moved and run.phase is not Phase.PREPARE:  # else nobody reads the change log yet
        # The producer's walsender looks at the publications anew; rows are not lost meanwhile, for the source let
        # no UPDATE or DELETE through while the table was published without an identity.
        await run.publications_changed(target)
    return bool(lost)


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
