"""Copies whose consumer is stopped or cut off: their lock on the source is let go, for whoever wants the table queues behind it.

Consumers do so for one another (`consumer.lease_keeper`), and free the claim; where the only one is stopped nobody else would.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import datetime

import asyncpg

from live_migration.common.postgres import asking, terminate_backend
from live_migration.coordinator.run import Run

INTERVAL_SECONDS = 1.0
_LONGEST_SECONDS = 60.0
"""For how long a lease may be seen run out while nobody waits: a consumer that lost the target for a moment renews it, and goes on."""

_RUN_OUT = """
    select format('%s.%s', t.schema_name, t.table_name) as name, c.owner, c.source_pid as pid, c.source_start as started
    from (select oid, owner, source_pid, source_start, lease_until from _live_migration.tables where state = 'copying'
          union all
          select oid, owner, source_pid, source_start, lease_until from _live_migration.parts where state = 'copying') c
    join _live_migration.tables t using (oid)
    where c.source_pid is not null and c.lease_until < clock_timestamp()
"""
_IS_THERE = "select exists (select from pg_stat_activity where pid = $1 and backend_start = $2)"
_WAITED_FOR = (
    "select array_agg(b) from pg_locks l, unnest(pg_blocking_pids(l.pid)) b where not l.granted and b = any($1::int[])"
)


async def watch_leases(run: Run) -> None:
    """End the session on the source of each copy whose lease ran out, once somebody waits for it there, or after a while; never returns.

    The claim stays as it is: it is freed by another consumer, or by its own once that wakes up and finds its session gone.
    """
    since: dict[tuple[int, datetime], float] = {}
    async with run.target_session("leases") as target:
        while True:
            with asking("target", "looking for copies whose lease ran out"):
                rows = await target.fetch(_RUN_OUT)
            now = time.monotonic()
            since = {(key := (row["pid"], row["started"])): since.get(key, now) for row in rows}
            if since:
                await _end_those_in_the_way(
                    run, rows, {pid for (pid, _), at in since.items() if now - at > _LONGEST_SECONDS}
                )
            await asyncio.sleep(INTERVAL_SECONDS)


async def _end_those_in_the_way(run: Run, rows: Sequence[asyncpg.Record], overdue: Collection[int]) -> None:
    async with run.source_session("leases") as source:
        with asking("source", "looking for copies whose lease ran out"):
            waited_for = set(await source.fetchval(_WAITED_FOR, [row["pid"] for row in rows]) or ())
            for row in rows:
                if row["pid"] not in waited_for.union(overdue) or not await source.fetchval(
                    _IS_THERE, row["pid"], row["started"]
                ):
                    continue
                with suppress(TimeoutError):  # it is asked again
                    await terminate_backend(source, row["pid"], row["started"])
                    run.reporter.warning(
                        f"the copy of {row['name']} gave its lock on the source back: its consumer {row['owner']} does not renew its lease"
                    )
