"""The two publications on the source, and the replica identities of the tables in them.

Every statement that locks somebody's table gives way after a short time and is tried again, so that nobody queues behind us for long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import asyncpg

from live_migration.common.errors import Retry, SourceError
from live_migration.common.postgres import asking, set_lock_timeout
from live_migration.common.relation import QualifiedName, ReplicaIdentity, quote_identifier

Operations = Literal["insert, update, delete, truncate", "insert, truncate"]
ALL_OPERATIONS: Operations = "insert, update, delete, truncate"
INSERT_ONLY: Operations = "insert, truncate"
FIRST_WITH_SCHEMA_PUBLICATIONS = 15
_BATCH = 50
_PATIENCE_SECONDS = 300.0
_LOOKUP_SECONDS = 2.0
_GONE = (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError, asyncpg.UndefinedObjectError)

_LOST = """
    select c.oid, n.nspname as schema, c.relname as name
    from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
    join pg_class c on c.oid = r.prrelid join pg_namespace n on n.oid = c.relnamespace
    where p.pubname = $1
      and case c.relreplident when 'f' then $2 and exists (
              select from pg_attribute a
              where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated <> '')
          else not exists (
              select from pg_index i
              where i.indrelid = c.oid and i.indislive and i.indisvalid and i.indisunique and i.indimmediate and i.indpred is null
                and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end
                and not exists (select from pg_attribute a
                                where a.attrelid = c.oid and a.attgenerated <> ''
                                  and a.attnum = any((i.indkey::int2[])[0:i.indnkeyatts - 1]))) end
"""
# As `common.catalog` has it; pg_get_replica_identity_index itself would wait for whoever locks one of the tables.
_SCHEMAS = """
    select n.nspname::text
    from pg_publication_namespace r join pg_publication p on p.oid = r.pnpubid join pg_namespace n on n.oid = r.pnnspid
    where p.pubname = $1
"""
_WRITERS = """
    select coalesce(array_agg(distinct virtualtransaction), '{}') from pg_locks
    where locktype = 'relation' and granted and pid <> pg_backend_pid()
      and database = (select oid from pg_database where datname = current_database())
      and mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
"""
_BLOCKERS = """
    select string_agg(distinct format('pid %s (%s)', a.pid, coalesce(nullif(a.application_name, ''), a.state)), ', ')
    from pg_locks l join pg_stat_activity a on a.pid = l.pid
    where l.locktype = 'relation' and l.relation = any($1::oid[]) and l.granted and l.pid <> pg_backend_pid()
      and l.database = (select oid from pg_database where datname = current_database())
      and l.mode in ('ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
"""


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table by its oid and its name at the time."""

    oid: int
    name: QualifiedName


class LockTimeout(SourceError):
    """Somebody has held a lock that we need for longer than we are patient. It will be had some time: nobody gives up for it."""

    retry: ClassVar[Retry] = Retry.RECONNECT
    default_hint = "Try again when that session has ended."


async def execute_politely(
    connection: asyncpg.Connection,
    statements: Sequence[str],
    *,
    lock_timeout: float,
    doing: str,
    relations: Iterable[int] = (),
    patience: float | None = None,
) -> None:
    """Run statements in one transaction, giving way after `lock_timeout` seconds at a lock and trying again.

    They are sent at once: whoever is stopped between two of them would keep the lock on somebody's table for as long as it sleeps.

    Raises:
        LockTimeout: the lock could not be had within `patience` seconds, some minutes by default; names who holds it.
    """
    patience = _PATIENCE_SECONDS if patience is None else patience
    deadline = time.monotonic() + patience
    pause = 0.1
    # Read-only by default is how some stop their writers.
    settings = ("set transaction read write", set_lock_timeout(lock_timeout))
    # Statements that come together are one transaction, which an error ends, too.
    script = ";\n".join((*settings, *statements))
    while True:
        try:
            with asking("source", doing):
                await connection.execute(script)
            return
        except SourceError as error:
            if not isinstance(error.__cause__, asyncpg.LockNotAvailableError | asyncpg.DeadlockDetectedError):
                raise
            if time.monotonic() >= deadline:
                holders = await connection.fetchval(_BLOCKERS, list(relations))
                raise LockTimeout(
                    f"source: {doing}: no lock within {patience:g} s; held by {holders or 'somebody'}"
                ) from error
        await asyncio.sleep(pause)
        pause = min(pause * 2, 5.0)


async def publications_present(connection: asyncpg.Connection, names: Sequence[str]) -> list[str]:
    """Give those of the names that are publications of this database."""
    rows = await connection.fetch(
        "select pubname::text from pg_publication where pubname = any($1::text[]) order by 1", list(names)
    )
    return [row[0] for row in rows]


async def create_publication(
    connection: asyncpg.Connection,
    name: str,
    operations: Operations,
    *,
    announce: Callable[[int], Awaitable[None]] | None = None,
) -> None:
    """Create an empty publication, which touches no table yet. `announce` is called with its oid before it is there."""
    with asking("source", f"creating publication {name}"):
        async with connection.transaction():
            await connection.execute(f"create publication {quote_identifier(name)} with (publish = '{operations}')")
            if announce is not None:
                await announce(await connection.fetchval("select oid from pg_publication where pubname = $1", name))


async def renew_decoding_catalog(connection: asyncpg.Connection, name: str) -> None:
    """Commit a change of the source's catalog that leaves nothing behind, so that decoding looks at the catalog anew.

    While a slot is made, PostgreSQL may take up a catalog that lacks what a transaction changed which had begun before and committed in
    between; it goes on with that one until the next change of the catalog. Seen with 18.6.
    """
    comment = f"comment on publication {quote_identifier(name)} is"
    with asking("source", f"commenting on publication {name}"):
        async with connection.transaction():
            await connection.execute("set local synchronous_commit = local")  # no standby need have it
            await connection.execute(f"{comment} 'the slot is made'; {comment} null")  # pg_dump finds none


async def drop_publication(connection: asyncpg.Connection, name: str, *, lock_timeout: float) -> bool:
    """Drop a publication once nothing is in it and nobody looks it up; tell whether there was one.

    A statement that writes first lists the publications of its table, then looks each one up, and fails where one is gone by then
    (`cache lookup failed for publication`): a publication that tables are in must never be dropped under somebody's writers.
    """
    if not await publications_present(connection, [name]):
        return False
    await _empty(connection, name, lock_timeout=lock_timeout)
    await _await_writers(connection)
    statement = f"drop publication if exists {quote_identifier(name)}"
    await execute_politely(connection, [statement], lock_timeout=lock_timeout, doing=f"dropping publication {name}")
    return True


async def _empty(connection: asyncpg.Connection, name: str, *, lock_timeout: float) -> None:
    """Take everything out of a publication."""
    publication = quote_identifier(name)
    if connection.get_server_version().major >= FIRST_WITH_SCHEMA_PUBLICATIONS and (
        schemas := await connection.fetch(_SCHEMAS, name)
    ):
        members = ", ".join(quote_identifier(row[0]) for row in schemas)
        statement = f"alter publication {publication} drop tables in schema {members}"
        doing = f"taking its schemas out of publication {name}"
        await execute_politely(connection, [statement], lock_timeout=lock_timeout, doing=doing)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while tables := await published_tables(connection, name):
        oids = list(tables)[:_BATCH]
        statement = f"alter publication {publication} drop table {', '.join(f'only {tables[oid].sql}' for oid in oids)}"
        doing = f"taking {tables[oids[0]]} and {len(oids) - 1} more out of publication {name}"
        try:
            await execute_politely(connection, [statement], lock_timeout=lock_timeout, doing=doing, relations=oids)
        except SourceError as error:
            # Dropped, renamed or taken out by somebody else since: look again.
            if not isinstance(error.__cause__, _GONE) or time.monotonic() >= deadline:
                raise


async def _await_writers(connection: asyncpg.Connection) -> None:
    """Wait for the transactions that write now: they may have listed a publication before it was emptied, and look it up yet.

    One that goes on beyond what a lookup takes by far idles, or is past it.
    """
    deadline = time.monotonic() + _LOOKUP_SECONDS
    writers = set(await connection.fetchval(_WRITERS))
    while writers and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
        writers &= set(await connection.fetchval(_WRITERS))


async def published_tables(connection: asyncpg.Connection, name: str) -> dict[int, QualifiedName]:
    """Give the tables of a publication."""
    rows = await connection.fetch(
        """select c.oid, n.nspname as schema, c.relname as name
           from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
           join pg_class c on c.oid = r.prrelid join pg_namespace n on n.oid = c.relnamespace
           where p.pubname = $1""",
        name,
    )
    return {row["oid"]: QualifiedName(row["schema"], row["name"]) for row in rows}


async def add_tables(
    connection: asyncpg.Connection,
    name: str,
    tables: Sequence[PublishedTable],
    *,
    lock_timeout: float,
    patience: float | None = None,
) -> None:
    """Add tables to a publication, each alone without its children, a few at a time; those in it stay.

    A table that was dropped or renamed meanwhile makes this raise SourceError: plan anew.

    Raises:
        LockTimeout: as `execute_politely`.
    """
    present = await published_tables(connection, name)
    missing = [table for table in tables if table.oid not in present]
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        members = ", ".join(f"only {table.name.sql}" for table in batch)
        await execute_politely(
            connection,
            [f"alter publication {quote_identifier(name)} add table {members}"],
            lock_timeout=lock_timeout,
            doing=f"publishing {batch[0].name} and {len(batch) - 1} more"
            if batch[1:]
            else f"publishing {batch[0].name}",
            relations=[table.oid for table in batch],
            patience=patience,
        )


async def remove_tables(
    connection: asyncpg.Connection,
    name: str,
    oids: Collection[int],
    *,
    lock_timeout: float,
    patience: float | None = None,
) -> None:
    """Take those of the tables that are in a publication out of it."""
    for oid, table in (await published_tables(connection, name)).items():
        if oid in oids:
            statement = f"alter publication {quote_identifier(name)} drop table only {table.sql}"
            doing = f"taking {table} out of publication {name}"
            await execute_politely(
                connection, [statement], lock_timeout=lock_timeout, doing=doing, relations=[oid], patience=patience
            )


async def tables_without_identity(
    connection: asyncpg.Connection, name: str, *, refuses_generated: bool
) -> list[PublishedTable]:
    """Give the tables of a publication on which UPDATE and DELETE fail now, because they have no identity any more."""
    rows = await connection.fetch(_LOST, name, refuses_generated)
    return [PublishedTable(row["oid"], QualifiedName(row["schema"], row["name"])) for row in rows]


async def move_table(
    connection: asyncpg.Connection,
    table: PublishedTable,
    before: str,
    after: str,
    *,
    lock_timeout: float,
    patience: float | None = None,
) -> None:
    """Move a table from one publication into another at once."""
    only = f"only {table.name.sql}"
    await execute_politely(
        connection,
        [
            f"alter publication {quote_identifier(before)} drop table {only}",
            f"alter publication {quote_identifier(after)} add table {only}",
        ],
        lock_timeout=lock_timeout,
        doing=f"moving {table.name} out of publication {before}",
        relations=[table.oid],
        patience=patience,
    )


async def set_identity_full(
    connection: asyncpg.Connection, table: PublishedTable, *, lock_timeout: float, patience: float | None = None
) -> None:
    """Give a table REPLICA IDENTITY FULL."""
    doing = f"giving {table.name} REPLICA IDENTITY FULL"
    await _alter_identity(connection, table, "full", lock_timeout=lock_timeout, doing=doing, patience=patience)


async def _alter_identity(
    connection: asyncpg.Connection,
    table: PublishedTable,
    identity: str,
    *,
    lock_timeout: float,
    doing: str,
    patience: float | None = None,
) -> None:
    """Set a replica identity, which says nothing of a table's children.

    Before 2.29 TimescaleDB refuses this for its tables of compressed rows, unless it is told to mind its own business.
    """
    statement = f"alter table {table.name.sql} replica identity {identity}"
    for statements in ([statement], ["set local timescaledb.restoring = on", statement]):
        try:
            await execute_politely(
                connection, statements, lock_timeout=lock_timeout, doing=doing, relations=[table.oid], patience=patience
            )
            return
        except SourceError as error:
            if len(statements) > 1 or not isinstance(error.__cause__, asyncpg.FeatureNotSupportedError):
                raise


def identity_without_full(before: ReplicaIdentity) -> str:
    """Give what a table has for REPLICA IDENTITY when FULL is taken back from it.

    An index that was its identity had been dropped already: the same as NOTHING, and all that can be set without it.
    """
    return "default" if before is ReplicaIdentity.DEFAULT else "nothing"


async def restore_identity(
    connection: asyncpg.Connection, oid: int, before: ReplicaIdentity, *, lock_timeout: float
) -> QualifiedName | None:
    """Take REPLICA IDENTITY FULL back from a table; None where the table is gone or was changed by somebody else since."""
    row = await connection.fetchrow(
        """select n.nspname as schema, c.relname as name from pg_class c join pg_namespace n on n.oid = c.relnamespace
           where c.oid = $1 and c.relreplident = 'f'""",
        oid,
    )
    if row is None:
        return None
    name = QualifiedName(row["schema"], row["name"])
    doing = f"giving {name} its replica identity back"
    identity = identity_without_full(before)
    await _alter_identity(connection, PublishedTable(oid, name), identity, lock_timeout=lock_timeout, doing=doing)
    return name
