"""Materialized views, whose rows no stream carries: filled at the hand-over, and again where what they read was refreshed after it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import asyncpg

from live_migration.common.catalog import USERS_OWN
from live_migration.common.errors import TargetError
from live_migration.common.postgres import asking
from live_migration.common.relation import QualifiedName
from live_migration.coordinator.dump_script import PG_CLASS
from live_migration.coordinator.made_definitions import load_made
from live_migration.coordinator.run import Run

_FILLED = f"""
    select c.oid, n.nspname as schema, c.relname as name from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'm' and c.relispopulated and {USERS_OWN}
    order by c.oid
"""

_MOST_LEVELS = 64
# What reads a relation does so by a rule of its own; the longest way tells what is read first.
_READERS = f"""
    with recursive reads as (
        select distinct r.ev_class as reader, d.refobjid as read from pg_depend d join pg_rewrite r on r.oid = d.objid
        where d.classid = 'pg_rewrite'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid <> r.ev_class
    ), reached (oid, level) as (
        select to_regclass(name)::oid, 0 from unnest($1::text[]) as name
        union
        select r.reader, level + 1 from reached join reads r on r.read = reached.oid where level < {_MOST_LEVELS}
    )
    select n.nspname as schema, c.relname as name, max(level) as level
    from reached join pg_class c using (oid) join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'm' and c.relispopulated and {USERS_OWN}
    group by c.oid, n.nspname, c.relname order by 3, c.oid
"""


async def refresh_materialized_views(run: Run, source: asyncpg.Connection) -> None:
    """Fill the materialized views that the source has filled; those that read others after these."""
    with asking("source", "listing materialized views"):
        rows = await source.fetch(_FILLED)
    made = await load_made(run.target)
    absent = made.entries.left_out if made else frozenset()
    views = [QualifiedName(row["schema"], row["name"]) for row in rows if (PG_CLASS, row["oid"]) not in absent]
    while views:
        failed = [(view, error) for view in views if (error := await _refresh(run, view)) is not None]
        if len(failed) == len(views):
            for view, error in failed:
                _warn(run, view, error)
            return
        views = [view for view, _ in failed]


async def refresh_readers(run: Run, relations: Collection[QualifiedName]) -> None:
    """Fill those materialized views anew that read one of the relations, through others, too; the source is asked for nothing."""
    with asking("target", "listing materialized views"):
        rows: Sequence[asyncpg.Record] = await run.target.fetch(_READERS, [name.sql for name in relations])
    for row in rows:
        view = QualifiedName(row["schema"], row["name"])
        run.reporter.note(f"filling {view} anew")
        if (error := await _refresh(run, view)) is not None:
            _warn(run, view, error)


def _warn(run: Run, view: QualifiedName, error: TargetError) -> None:
    run.reporter.warning(
        f"materialized view {view} could not be filled, do it by hand: refresh materialized view {view.sql}; {error.message}"
    )


async def _refresh(run: Run, view: QualifiedName) -> TargetError | None:
    try:
        with asking("target", f"filling {view}"):
            await run.target.execute(f"refresh materialized view {view.sql}")
    except TargetError as error:
        return error
    return None
