"""Renews what this consumer claims, tells it what it has lost, and frees what dead consumers left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import asyncpg

from live_migration.common.errors import ConnectionLost, Fenced, LiveMigrationError, Retry
from live_migration.common.postgres import terminate_backend
from live_migration.common.state import record_event
from live_migration.common.telemetry import get_logger
from live_migration.consumer.claims import Claim, IndexClaim, PartClaim, TableClaim
from live_migration.consumer.interrupts import Interrupt
from live_migration.consumer.sessions import Backoff, SharedSession

C = TypeVar("C", bound=Claim)
C_co = TypeVar("C_co", bound=Claim, covariant=True)
TICK_SECONDS = 1.0
"""Between two looks; also how often the progress of running copies is written down."""

log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class Lease(Generic[C_co]):
    """A claim that we hold, what ends the work on it, and how far the work is."""

    claim: C_co
    interrupt: Interrupt = field(default_factory=Interrupt)
    byte_count: int = 0
    is_finishing: bool = False
    """The last statements are under way: that the claim is seen to have ended is no news any more."""

    def progress(self, byte_count: int) -> None:
        self.byte_count = byte_count


_RENEW_TABLES = """
    update _live_migration.tables t
    set lease_until = clock_timestamp() + make_interval(secs => $2),
        byte_count = case when t.snapshot_id is null then h.bytes else
                     (select coalesce(sum(p.byte_count), 0) from _live_migration.parts p where p.oid = t.oid) end,
        row_count = case when t.snapshot_id is null then
                    coalesce((select c.tuples_processed from pg_stat_progress_copy c where c.pid = t.backend_pid
                                and (t.copies_to_root or c.relid = to_regclass(format('%I.%I', t.schema_name, t.table_name)))), t.row_count)
                    else (select coalesce(sum(p.row_count), 0) from _live_migration.parts p where p.oid = t.oid) end
    from (select h.* from unnest($3::oid[], $4::int[], $5::bigint[]) as h (oid, attempt, bytes) join _live_migration.tables l using (oid)
          where l.attempt = h.attempt and l.owner = $1 and l.state = 'copying'
          order by l.oid for no key update of l) h
    where t.oid = h.oid and t.attempt = h.attempt and t.owner = $1 and t.state = 'copying'
    returning t.oid, t.attempt
"""

_RENEW_PARTS = """
    update _live_migration.parts p
    set lease_until = clock_timestamp() + make_interval(secs => $2), byte_count = h.bytes,
        row_count = coalesce((select c.tuples_processed from pg_stat_progress_copy c where c.pid = p.backend_pid), p.row_count)
    from unnest($3::oid[], $4::int[], $5::bigint[], $6::int[]) as h (oid, attempt, bytes, part)
    where p.oid = h.oid and p.part = h.part and p.attempt = h.attempt and p.owner = $1 and p.state = 'copying'
      and exists (select from _live_migration.tables t where t.oid = p.oid and t.attempt = p.attempt and t.state = 'copying')
    returning p.oid, p.attempt, p.part
"""

_RENEW_INDEXES = """
    update _live_migration.indexes set lease_until = clock_timestamp() + make_interval(secs => $2)
    where oid = any($3::oid[]) and owner = $1 and state = 'building'
    returning oid
"""

_ABANDONED = """
    select 'table' as kind, t.oid, null::int as part, t.schema_name || '.' || t.table_name as name, t.owner,
           t.backend_pid, t.backend_start, t.source_pid, t.source_start
    from _live_migration.tables t
    where t.state = 'copying' and (t.lease_until < clock_timestamp() or t.owner = $1 and not t.oid = any($2::oid[]))
    union all
    select 'part', p.oid, p.part, t.schema_name || '.' || t.table_name || ', part ' || p.part, p.owner,
           p.backend_pid, p.backend_start, p.source_pid, p.source_start
    from _live_migration.parts p join _live_migration.tables t on t.oid = p.oid
    where p.state = 'copying' and (p.lease_until < clock_timestamp() or p.owner = $1 and not exists (
        select from unnest($3::oid[], $4::int[]) as h (oid, part) where h.oid = p.oid and h.part = p.part))
    union all
    select 'index', i.oid, null, i.name, i.owner, i.backend_pid, i.backend_start, null, null
    from _live_migration.indexes i
    where i.state = 'building' and (i.lease_until < clock_timestamp() or i.owner = $1 and not i.oid = any($5::oid[]))
"""

_FREE = "owner = null, backend_pid = null, backend_start = null, lease_until = null"
_STILL = "owner = $2 and backend_pid = $3 and backend_start = $4 and (owner = $5 or lease_until < clock_timestamp())"

_FREE_BY_KIND = {
    "table": f"""update _live_migration.tables
                 set state = 'planned', retry_at = null, snapshot_id = null, source_pid = null, source_start = null, {_FREE}
                 where oid = $1 and state = 'copying' and {_STILL}""",
    "part": f"""update _live_migration.parts
                set state = 'pending', row_count = 0, byte_count = 0, source_pid = null, source_start = null, {_FREE}
                where oid = $1 and part = $6 and state = 'copying' and {_STILL}""",
    "index": f"""update _live_migration.indexes set state = 'pending', retry_at = null, {_FREE}
                 where oid = $1 and state = 'building' and {_STILL}""",
}


class LeaseKeeper:
    """Knows the consumer's claims; `run` renews them all, each second, on a session that does no other work."""

    def __init__(self, owner: str, lease_seconds: float, control: SharedSession, source: SharedSession) -> None:
        self._owner = owner
        self._lease_seconds = lease_seconds
        self._control = control
        self._source = source
        self._held: set[Lease[Claim]] = set()
        self._claiming = asyncio.Lock()
        self._end: LiveMigrationError | None = None

    async def claim(self, claiming: Awaitable[C | None]) -> Lease[C] | None:
        """Await a claim and hold it from then on, until `drop`."""
        async with self._claiming:  # else `_free_abandoned` could see it claimed by us, yet not held
            claim = await claiming
            return None if claim is None else self._hold(claim, Interrupt())

    async def claim_group(self, claiming: Awaitable[Sequence[C]]) -> list[Lease[C]]:
        """Do the same for claims on work that is done, or ended, together: they have one interrupt."""
        async with self._claiming:
            interrupt = Interrupt()
            return [self._hold(claim, interrupt) for claim in await claiming]

    def _hold(self, claim: C, interrupt: Interrupt) -> Lease[C]:
        lease = Lease(claim, interrupt)
        if self._end is not None:
            interrupt.trigger(self._end)
        self._held.add(lease)
        return lease

    def drop(self, lease: Lease[Claim]) -> None:
        """Hold a claim no longer; if the state still has it as ours, it is freed within moments, its backends ended."""
        self._held.discard(lease)

    def interrupt_all(self, reason: LiveMigrationError) -> None:
        """End all work on what is held, and on what is claimed from now on."""
        self._end = reason
        for lease in self._held:
            lease.interrupt.trigger(reason)

    async def run(self, ended: asyncio.Event) -> None:
        """Renew and free until cancelled; a target that is away is waited for."""
        backoff = Backoff(longest_seconds=self._lease_seconds / 3)
        while True:
            try:
                async with self._control.use("renewing leases") as connection:
                    await self._renew(connection)
                await self._free_abandoned()
                backoff.reset()
                await asyncio.sleep(min(TICK_SECONDS, self._lease_seconds / 3))
            except LiveMigrationError as error:
                if error.retry is Retry.STOP:
                    raise
                await backoff.pause(error, ended)

    async def _renew(self, connection: asyncpg.Connection) -> None:
        held = [lease for lease in self._held if not lease.is_finishing]
        await self._renew_kind(connection, _RENEW_TABLES, [h for h in held if isinstance(h.claim, TableClaim)])
        await self._renew_kind(connection, _RENEW_PARTS, [h for h in held if isinstance(h.claim, PartClaim)])
        await self._renew_kind(connection, _RENEW_INDEXES, [h for h in held if isinstance(h.claim, IndexClaim)])

    async def _renew_kind(self, connection: asyncpg.Connection, query: str, leases: list[Lease[Claim]]) -> None:
        if not leases:
            return
        arguments: list[object] = [[lease.claim.oid for lease in leases]]
        if query is not _RENEW_INDEXES:
            arguments.append([getattr(lease.claim, "attempt", 0) for lease in leases])
            arguments.append([lease.byte_count for lease in leases])
        if query is _RENEW_PARTS:
            arguments.append([getattr(lease.claim, "part", 0) for lease in leases])
        rows = await connection.fetch(query, self._owner, self._lease_seconds, *arguments)
        renewed = {tuple(row.values()) for row in rows}
        for lease in leases:
            if _key(lease.claim) not in renewed and not lease.is_finishing:
                lease.interrupt.trigger(Fenced(f"{lease.claim}: the claim was taken over by somebody else"))

    async def _free_abandoned(self) -> None:
        """Free what ran out, and what is ours by name only: from work whose end could not be written down."""
        async with self._claiming, self._control.use("looking for abandoned claims") as connection:
            claims = [lease.claim for lease in self._held]
            parts = [claim for claim in claims if isinstance(claim, PartClaim)]
            rows = await connection.fetch(
                _ABANDONED,
                self._owner,
                [claim.oid for claim in claims if isinstance(claim, TableClaim)],
                [claim.oid for claim in parts],
                [claim.part for claim in parts],
                [claim.oid for claim in claims if isinstance(claim, IndexClaim)],
            )
        # All of them before the first claim is freed: one that is stopped may hold locks on the claims of another.
        for row in rows:
            await self._end_backends(row)
        for row in rows:
            await self._free(row)

    async def _end_backends(self, row: asyncpg.Record) -> None:
        """End the backends of a claim: nothing that was sent before may be done later."""
        if row["source_pid"] is not None:
            await self._end_on_source(row)
        async with self._control.use(f"ending the sessions of {row['name']}") as connection:
            await terminate_backend(connection, row["backend_pid"], row["backend_start"])

    async def _free(self, row: asyncpg.Record) -> None:
        async with self._control.use(f"freeing {row['name']}") as connection:
            arguments = [row["oid"], row["owner"], row["backend_pid"], row["backend_start"], self._owner]
            if row["kind"] == "part":
                arguments.append(row["part"])
            status = await connection.execute(_FREE_BY_KIND[row["kind"]], *arguments)
            if status == "UPDATE 1" and row["owner"] != self._owner:
                message = f"{row['owner']} is gone: {row['kind']} {row['name']} is given to another consumer"
                log.warning("claim freed", claim=row["name"], owner=row["owner"])
                await record_event(connection, "warning", message)

    async def _end_on_source(self, row: asyncpg.Record) -> None:
        """End the backend that holds lock and snapshot there; it cannot write, so that it is not waited for long."""
        try:
            async with self._source.use("ending a dead consumer's session") as connection:
                await terminate_backend(connection, row["source_pid"], row["source_start"])
        except ConnectionLost as error:
            log.warning("source session not ended", claim=row["name"], reason=error.message)


def _key(claim: Claim) -> tuple[int, ...]:
    if isinstance(claim, TableClaim):
        return (claim.oid, claim.attempt)
    if isinstance(claim, PartClaim):
        return (claim.oid, claim.attempt, claim.part)
    return (claim.oid,)
