"""The replication slot on the source: who the source is, making the slot, what it waits for, looking at it, dropping it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.errors import SlotError, SourceError
from live_migration.common.lsn import Lsn
from live_migration.common.postgres import asking, session
from live_migration.producer.replication import ReplicationConnection
from live_migration.producer.timeline import SystemIdentity, identify

PLUGIN = "pgoutput"
_REPORT_SECONDS = 2.0
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """A transaction with an xid that has not ended. `gid`: of a prepared one, which has no pid."""

    xid: int
    pid: int | None
    gid: str | None
    application: str
    user: str
    database: str
    state: str
    age_seconds: float | None

    def __str__(self) -> str:
        who = f"prepared transaction {self.gid!r}" if self.gid is not None else f"pid {self.pid}"
        known = [self.application, self.user and f"user {self.user}", self.database and f"database {self.database}"]
        if self.age_seconds is not None:
            known.append(f"{self.age_seconds:.0f} s old")
        known.append(self.state)
        return f"{who} ({', '.join(part for part in known if part)})"


@dataclass(frozen=True, slots=True)
class SlotState:
    """A slot as pg_replication_slots shows it. LSNs are integers; `retained_bytes`: WAL kept for it."""

    plugin: str
    database: str
    active_pid: int | None
    confirmed_lsn: int | None
    retained_bytes: int
    wal_status: str
    safe_wal_bytes: int | None
    reason: str = ""
    """Why it was invalidated, where the server (17 and later) says so."""


class SlotTimeout(SlotError):
    """Transactions on the source did not end in time."""

    default_hint = (
        "End these transactions (a prepared one by COMMIT PREPARED or ROLLBACK PREPARED), or raise --slot-timeout, "
        "and run `live-migration migrate` again."
    )


_OPEN_TRANSACTIONS = """
    select l.transactionid::text::bigint as xid, l.pid, null::text as gid, coalesce(a.application_name, '') as application,
           coalesce(a.usename::text, '') as user, coalesce(a.datname::text, '') as database,
           coalesce(a.state, '') as state, extract(epoch from clock_timestamp() - a.xact_start)::float8 as age_seconds
    from pg_locks l left join pg_stat_activity a on a.pid = l.pid
    where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted and l.pid is not null
      and l.pid <> pg_backend_pid() and coalesce(a.backend_type, '') <> 'autovacuum worker'
    union all
    select p.transaction::text::bigint, null, p.gid, '', p.owner::text, p.database::text, 'prepared',
           extract(epoch from clock_timestamp() - p.prepared)::float8
    from pg_prepared_xacts p
    order by age_seconds desc nulls last
"""

_SLOT = """
    select plugin::text, database::text, active_pid, confirmed_flush_lsn as confirmed_lsn,
           coalesce(pg_wal_lsn_diff(pg_current_wal_insert_lsn(), restart_lsn), 0)::bigint as retained_bytes,
           coalesce(wal_status, '') as wal_status, safe_wal_size as safe_wal_bytes,
           coalesce(to_jsonb(s) ->> 'invalidation_reason', '') as reason
    from pg_replication_slots s where slot_name = $1
"""


_DROP_UNREAD = """
    select pg_drop_replication_slot(slot_name) from pg_replication_slots
    where slot_name = $1 and confirmed_flush_lsn = $2 and active_pid is null
"""


async def identify_system(uri: str) -> SystemIdentity:
    """Ask the source who it is, over a replication connection.

    Raises:
        ConnectionLost: it cannot be reached.
        SourceError: the role may not replicate, or the server takes no walsender.
    """
    try:
        async with await ReplicationConnection.open(uri) as stream:
            return await identify(stream)
    except SourceError as error:
        raise SourceError(
            f"the source takes no replication connection: {error.message}",
            hint="The role needs the REPLICATION attribute, and max_wal_senders room for one more.",
        ) from error


async def open_transactions(connection: asyncpg.Connection, *, database: str | None = None) -> list[OpenTransaction]:
    """Give the cluster's open transactions that have an xid, oldest first, without our own session's.

    Sees other roles' transactions without special rights. Subtransactions are not listed apart.
    """
    found: dict[tuple[int | None, str | None], OpenTransaction] = {}
    for row in await connection.fetch(_OPEN_TRANSACTIONS):
        transaction = OpenTransaction(**row)
        if database is None or transaction.database == database:
            found.setdefault((transaction.pid, transaction.gid), transaction)
    return list(found.values())


def describe_transactions(transactions: Sequence[OpenTransaction]) -> str:
    """Name transactions for people, the oldest few of them."""
    if not transactions:
        return "transactions that cannot be seen (pg_stat_activity, pg_prepared_xacts)"
    shown = "; ".join(str(transaction) for transaction in transactions[:_SHOWN])
    return shown + (f"; and {len(transactions) - _SHOWN} more" if len(transactions) > _SHOWN else "")


async def read_slot(connection: asyncpg.Connection, name: str) -> SlotState | None:
    """Give a slot's state, or None where there is no such slot."""
    row = await connection.fetchrow(_SLOT, name)
    return SlotState(**row) if row else None


async def create_slot(uri: str, name: str, *, timeout: float, on_wait: Callable[[str], None]) -> int:
    """Create the slot and give its consistent point: each transaction that commits after it is in its stream.

    The server waits for the transactions that run now; `on_wait` is told every few seconds which.

    Raises:
        SlotTimeout: they did not end within `timeout` seconds; no slot of ours is left.
        SourceError: the source refuses.
    """
    async with (
        session(uri, "source", application="live-migration watch") as watcher,
        session(uri, "source", application="live-migration slot") as creator,
    ):
        pid = creator.get_server_pid()
        # so that a standby with sync_replication_slots has it, too, should the source fail over
        options = ", failover => true" if creator.get_server_version().major >= 17 else ""
        creation = asyncio.ensure_future(
            creator.fetchval(f"select lsn from pg_create_logical_replication_slot($1, $2{options})", name, PLUGIN)
        )
        try:
            await _watch_creation(creation, watcher, pid, timeout, on_wait)
            with asking("source", f"creating slot {name}"):
                return int(await creation)
        except BaseException:
            with asking("source", f"giving up slot {name}"):
                await _give_up(creation, watcher, pid, name)
            raise


async def _give_up(creation: asyncio.Future[object], watcher: asyncpg.Connection, pid: int, name: str) -> None:
    """End the creation, and drop the slot that it made: no other, for a successor of ours may have made its own by now.

    Until it is made the slot goes with its backend. The one that was made stands where it began: nobody reads it yet.
    """
    # A backend that waits does not notice that its client left; it would make the slot later.
    await watcher.execute("select pg_terminate_backend($1, 5000)", pid)
    await asyncio.wait([creation], timeout=5)
    if not creation.done():
        creation.cancel()
        await asyncio.wait([creation], timeout=5)
    elif not creation.cancelled() and creation.exception() is None:
        await watcher.execute(_DROP_UNREAD, name, creation.result())


async def _watch_creation(
    creation: asyncio.Future[object],
    watcher: asyncpg.Connection,
    pid: int,
    timeout: float,
    on_wait: Callable[[str], None],
) -> None:
    deadline = time.monotonic() + timeout
    while not (await asyncio.wait([creation], timeout=min(_REPORT_SECONDS, timeout)))[0]:
        with asking("source", "looking at open transactions"):
            waited_for = [t for t in await open_transactions(watcher) if t.pid != pid]
        if time.monotonic() >= deadline:
            raise SlotTimeout(
                f"the slot could not be made within {timeout:g} s, for transactions on the source are still open: "
                f"{describe_transactions(waited_for)}"
            )
        on_wait(f"slot creation waits for open transactions on the source: {describe_transactions(waited_for)}")


async def await_older_transactions(
    connection: asyncpg.Connection, *, timeout: float, on_wait: Callable[[str], None], what: str
) -> None:
    """Wait until every transaction that runs now, prepared ones included, has ended.

    Raises:
        SlotTimeout: they did not end within `timeout` seconds.
    """
    # An xid of our own: a snapshot's xmax is only past the last one that has ended, and may be that of one that runs.
    with asking("source", "reading the newest transaction"):
        last = await connection.fetchval("select pg_current_xact_id()::text::numeric")
    began = reported = time.monotonic()
    while True:
        with asking("source", "waiting for open transactions"):
            oldest = await connection.fetchval("select pg_snapshot_xmin(pg_current_snapshot())::text::numeric")
            if oldest > last:
                return
            now = time.monotonic()
            if now - reported >= min(_REPORT_SECONDS, timeout) or now - began >= timeout:
                reported = now
                older = [t for t in await open_transactions(connection) if _is_before(t.xid, int(last))]
                if now - began >= timeout:
                    raise SlotTimeout(
                        f"{what}: transactions on the source are still open after {timeout:g} s: "
                        f"{describe_transactions(older)}"
                    )
                on_wait(f"{what} waits for open transactions on the source: {describe_transactions(older)}")
        await asyncio.sleep(0.1)


def _is_before(xid: int, last: int) -> bool:
    """Compare a 32-bit xid with a 64-bit one, across a wraparound."""
    return (xid - last) & 0xFFFFFFFF >= 0x80000000


async def drop_slot(connection: asyncpg.Connection, name: str, *, timeout: float = 30.0) -> bool:
    """Drop a slot, ending its walsender first; tell whether there was one.

    Raises:
        SlotError: it is not a slot of this program in this database, or its walsender does not end.
    """
    deadline = time.monotonic() + timeout
    is_dropped = False
    with asking("source", f"dropping slot {name}"):
        while (slot := await read_slot(connection, name)) is not None:
            await require_own_slot(connection, name, slot)
            if slot.active_pid is not None:
                await connection.execute("select pg_terminate_backend($1, 1000)", slot.active_pid)
            try:
                await connection.execute("select pg_drop_replication_slot($1)", name)
                is_dropped = True
            except (asyncpg.ObjectInUseError, asyncpg.UndefinedObjectError):
                if time.monotonic() > deadline:
                    raise SlotError(
                        f"slot {name} stays in use by pid {slot.active_pid}",
                        hint="Stop every producer of this migration, then try again.",
                    ) from None
                await asyncio.sleep(0.1)
    return is_dropped


async def require_own_slot(connection: asyncpg.Connection, name: str, slot: SlotState) -> None:
    """Raise SlotError unless the slot is one that this program could have made here."""
    database = await connection.fetchval("select current_database()::text")
    if slot.plugin != PLUGIN or slot.database != database:
        raise SlotError(
            f"slot {name} is not ours: plugin {slot.plugin or 'none'}, database {slot.database or 'none'}",
            hint="Choose another --name.",
        )


def describe_slot(name: str, slot: SlotState) -> str:
    """Say what a slot holds, for people."""
    at = f", confirmed to {Lsn(slot.confirmed_lsn)}" if slot.confirmed_lsn is not None else ""
    return f"slot {name} (retains {slot.retained_bytes / 1048576:.1f} MiB of WAL, {slot.wal_status or 'unknown'}{at})"
