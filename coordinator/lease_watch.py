"""Copies whose consumer is stopped or cut off: their lock on the source is let go, for everybody who wants the table queues behind it.

Consumers do so for one another (`consumer.lease_keeper`), and free the claim; where the only one is stopped nobody else would.
"""

from __future__ import annotations

import asyncio

from live_migration.common.postgres import asking, terminate_backend
from live_migration.coordinator.run import Run

INTERVAL_SECONDS = 1.0

_RUN_OUT = """
    select format('%s.%s', t.schema_name, t.table_name) as name, c.owner, c.source_pid, c.source_start
    from (select oid, owner, source_pid, source_start, lease_until from _live_migration.tables where state = 'copying'
          union all
          select oid, owner, source_pid, source_start, lease_until from _live_migration.parts where state = 'copying') c
    join _live_migration.tables t using (oid)
    where c.source_pid is not null and c.lease_until < clock_timestamp()
"""


async def watch_leases(run: Run) -> None:
    """End the session on the source of each copy whose lease ran out; never returns.

    The claim stays as it is: it is freed by another consumer, or by its own once that wakes up and finds its session gone.
    """
    ended: set[tuple[int, object]] = set()
    async with run.target_session("leases") as target:
        while True:
            with asking("target", "looking for copies whose lease ran out"):
                rows = await target.fetch(_RUN_OUT)
            for row in rows:
                if (session := (row["source_pid"], row["source_start"])) not in ended:
                    await _end(run, *session)
                    ended.add(session)
                    run.reporter.warning(
                        f"the copy of {row['name']} gave its lock on the source back: its consumer {row['owner']} does not renew its lease"
                    )
            await asyncio.sleep(INTERVAL_SECONDS)


async def _end(run: Run, pid: int, started: object) -> None:
    async with run.source_session("leases") as source:
        with asking("source", "ending the session of a copy whose lease ran out"):
            await terminate_backend(source, pid, started)
