"""A source that failed over: the new timeline is compared with what was published and copied before anybody goes on.

A promoted standby that lagged lacks the last transactions of its former primary, and gives their xids and WAL positions to others. What
was published of them is a loss (`losses`). A table whose snapshot may have seen some of them is copied again; a chunk by its lane, once
its hypertable on the target takes rows. Until the new timeline stands in the state, no consumer copies from it, and the producer streams only what the coordinator names.
"""

from __future__ import annotations

import asyncio

from live_migration.common.catalog import CURRENT_TIMELINE
from live_migration.common.errors import ConnectionLost
from live_migration.common.lsn import Lsn
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.state import Phase
from live_migration.coordinator import steps
from live_migration.coordinator.made_definitions import load_made
from live_migration.coordinator.prepare import publish_tables
from live_migration.coordinator.recopy import FENCE_LANES, FORGET_COPY, FREE_INDEXES, LOCK_TABLES, end_work
from live_migration.coordinator.run import Run
from live_migration.producer.publication import published_tables
from live_migration.producer.slot import SlotTimeout, await_older_transactions
from live_migration.producer.timeline import SourceTimeline, read_timeline

INTERVAL_SECONDS = 5.0

_TIMELINE = f"select case when pg_is_in_recovery() then null else {CURRENT_TIMELINE} end"

# $1: timelines that led to this one, $2: where they were left, $3: tables whose changes were not all published
_LEFT = "coalesce((select l from unnest($1::int[], $2::text[]::pg_lsn[]) as u (t, l) where u.t = timeline), '0/0')"
_COPY_AGAIN = f"""
    update _live_migration.tables t
    set state = 'planned', {FORGET_COPY}
    where kind <> 'hypertable' and newcomer is distinct from 'gone' and (state = 'copying' or oid = any($3::oid[]) or horizon > {_LEFT})
      and not (kind = 'chunk' and $4 and state in ('copied', 'ready'))
    returning schema_name || '.' || table_name as name
"""

_REBUILD_AGAIN = f"""
    update _live_migration.tables t
    set rebuild = coalesce(rebuild, 'the source failed over')
    where (kind = 'chunk' and $4 and state in ('copied', 'ready') or kind = 'hypertable' and newcomer = 'followed')
      and newcomer is distinct from 'gone' and (oid = any($3::oid[]) or horizon > {_LEFT})
    returning schema_name || '.' || table_name as name
"""

# The snapshot of a hypertable says which chunks were gone by then, and below where the timeline was left both have one history.
_CUT_HYPERTABLES = f"""
    update _live_migration.tables set horizon = least(horizon, {_LEFT}) where kind = 'hypertable' and newcomer is null
"""


_MARK = """
    update _live_migration.tables set is_unpublished = true
    where oid = any($1::oid[]) and (kind = 'table' and newcomer is null or newcomer = 'followed')
"""
_UNMARK = "update _live_migration.tables set is_unpublished = false where oid = any($1::oid[])"


async def follow_timeline(run: Run) -> None:
    """Take over the timeline that the source is on now, after what was published was compared with it (`losses.find_loss`).

    Tables that were copied beyond where the former timeline was left, and those that are being copied, are copied again; the
    migration goes back to phase `copy` for them.
    """
    source = await read_timeline(run.settings.source_uri())
    before = run.migration.source_timeline
    if source.timeline == before:
        return
    if await steps.has_passed_barrier(run.target):
        run.reporter.warning(
            f"the source failed over to timeline {source.timeline} after the last barrier: the target holds what the former "
            "primary held, which may be more; what is copied from now on (sequences, unlogged tables) is the new one's"
        )
        return
    if before not in source.left:
        raise ConnectionLost(f"the source has changed to timeline {source.timeline} just now")
    unpublished = await _publish_again(run)
    await end_work(run.target)  # whoever copies reads from the former primary; and a stopped one would keep its locks
    names = await _take_over(run, source, unpublished)
    left = Lsn(source.left[before])
    if names:
        run.reporter.warning(
            f"the source failed over: timeline {before} was left at {left}. {len(names)} tables were copied from beyond that, or were "
            f"being copied, and are copied again: {name_list(names)}"
        )
    else:
        run.reporter.warning(
            f"the source failed over: timeline {before} was left at {left}; nothing was copied beyond that"
        )


async def _take_over(run: Run, source: SourceTimeline, unpublished: list[int]) -> list[str]:
    left = list(source.left), [str(Lsn(lsn)) for lsn in source.left.values()]
    made = await load_made(run.target)
    is_by_lane = run.phase in (Phase.REPLAY, Phase.CUTOVER) or (made is not None and made.is_flat)
    async with run.target_transaction("following the source to its new timeline") as target:
        await target.execute("update _live_migration.migration set source_timeline = $1", source.timeline)
        await target.execute(LOCK_TABLES)
        rebuilt = await target.fetch(_REBUILD_AGAIN, *left, unpublished, is_by_lane)
        rows = await target.fetch(_COPY_AGAIN, *left, unpublished, is_by_lane)
        await target.execute(_CUT_HYPERTABLES, *left)
        await target.execute(_UNMARK, unpublished)
        if rows or rebuilt:
            # A lane that goes on must ask the new snapshot, and one that sleeps must not wake up with the old one.
            await target.execute(FENCE_LANES)
        if rows:
            await target.execute(
                "delete from _live_migration.parts where oid in "
                "(select oid from _live_migration.tables where state = 'planned')"
            )
            await target.execute(FREE_INDEXES)
            if run.phase in (Phase.REPLAY, Phase.CUTOVER):
                await run.enter(Phase.COPY)
    await run.reload()
    return sorted(row["name"] for row in (*rows, *rebuilt))


async def _publish_again(run: Run) -> list[int]:
    """Publish planned tables that the new primary does not have in our publications; give them, for their changes were missed."""
    settings = run.settings
    with asking("target", "reading the plan"):
        planned = frozenset(row["oid"] for row in await run.target.fetch("select oid from _live_migration.tables"))
    async with run.source_session("failover") as connection:
        published = {
            **await published_tables(connection, settings.publication),
            **await published_tables(connection, settings.insert_publication),
        }
        missing = sorted(planned - published.keys())
        if missing:
            # First the mark (see `publication_watch`): an attempt that comes no further leaves them published, as if nothing had been missed.
            async with run.target_transaction("noting what is not published any more") as target:
                await target.execute(_MARK, missing)
            await publish_tables(run, connection, only=planned)
            try:
                await await_older_transactions(
                    connection, timeout=settings.slot_timeout, on_wait=run.reporter.note, what="publishing tables again"
                )
            except SlotTimeout as error:
                raise ConnectionLost(error.message) from error
    return missing


async def watch_timeline(run: Run) -> None:
    """Look by a new connection now and then whether SOURCE leads to another timeline; never returns.

    Raises:
        ConnectionLost: it does; the migration is to be led anew, which takes the new timeline over.
    """
    while True:
        await asyncio.sleep(INTERVAL_SECONDS)
        async with run.source_session("timeline") as connection:
            with asking("source", "asking for the timeline"):
                timeline = await connection.fetchval(_TIMELINE)
        if timeline is None or timeline == run.migration.source_timeline:
            continue
        async with run.target_session("timeline") as target:
            is_past = await steps.has_passed_barrier(target)
        if not is_past:
            raise ConnectionLost(
                f"the source is on timeline {timeline}, it was on {run.migration.source_timeline}: it failed over"
            )
