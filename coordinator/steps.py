"""What a phase has done already, kept in the state so that the phase can be entered again after a crash."""

from __future__ import annotations

import asyncpg

from live_migration.common.errors import Fenced
from live_migration.common.postgres import asking

BARRIER = "barrier"
"""Done when the target has passed the last barrier: it holds every change of the source from then on."""


async def has_passed_barrier(target: asyncpg.Connection) -> bool:
    """Tell whether the target holds every change of the source, so that neither slot nor log are needed any more."""
    with asking("target", "reading the migration's state"):
        return await is_done(target, BARRIER)


async def require_role(target: asyncpg.Connection, epoch: int) -> None:
    """Raise Fenced unless we are still the coordinator; inside a transaction it stays so until its end."""
    if not await target.fetchval("select true from _live_migration.migration where epoch = $1 for share", epoch):
        raise Fenced("another coordinator runs this migration now")


async def begin(target: asyncpg.Connection, name: str) -> None:
    """Record that a step begins, if it was not begun before."""
    await target.execute("insert into _live_migration.steps (name) values ($1) on conflict do nothing", name)


async def is_begun(target: asyncpg.Connection, name: str) -> bool:
    """Tell whether a step was begun, be it done or not."""
    return bool(await target.fetchval("select exists (select from _live_migration.steps where name = $1)", name))


async def is_done(target: asyncpg.Connection, name: str) -> bool:
    """Tell whether a step is done."""
    return bool(await target.fetchval("select is_done from _live_migration.steps where name = $1", name))


async def progress(target: asyncpg.Connection, name: str) -> int:
    """Give how many entries of a step are done."""
    return await target.fetchval("select progress from _live_migration.steps where name = $1", name) or 0


async def advance(target: asyncpg.Connection, epoch: int, name: str, progress: int) -> None:
    """Record a step's progress; inside the transaction that made it."""
    await require_role(target, epoch)
    await target.execute(
        """insert into _live_migration.steps (name, progress) values ($1, $2)
           on conflict (name) do update set progress = excluded.progress, at = clock_timestamp()""",
        name,
        progress,
    )


async def finish(target: asyncpg.Connection, epoch: int, name: str) -> None:
    """Record that a step is done; inside the transaction that ended it."""
    await require_role(target, epoch)
    await target.execute(
        """insert into _live_migration.steps (name, is_done) values ($1, true)
           on conflict (name) do update set is_done = true, at = clock_timestamp()""",
        name,
    )
