"""Phase `prepare`: topics, identities, publications, slot, and the wait that makes table snapshots safe.

What is made is announced in the state first. When the phase is entered again, what an earlier attempt made is
removed and made anew: nothing has been read from it yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg

from live_migration.common import control, kafka
from live_migration.common.catalog import TableInfo
from live_migration.common.control import POSITION
from live_migration.common.errors import KafkaError, SlotError, SourceError
from live_migration.common.lsn import Lsn
from live_migration.common.postgres import asking
from live_migration.common.progress import format_bytes
from live_migration.common.relation import ReplicaIdentity
from live_migration.common.settings import Settings
from live_migration.common.state import Phase
from live_migration.common.timescale import read_layout
from live_migration.coordinator import planning, steps
from live_migration.coordinator.beside import beside
from live_migration.coordinator.control_topic import producer_config, write_config, write_homes
from live_migration.coordinator.giving_back import give_back
from live_migration.coordinator.identity_watch import watch_identities
from live_migration.coordinator.ownership import (
    Claim,
    read_claim,
    record_publication,
    require_our_topics,
    require_ours_on_source,
    sign_topics,
)
from live_migration.coordinator.planning import Memberships
from live_migration.coordinator.recopy import adopt_memberships, drop_built_indexes, planned_tables
from live_migration.coordinator.run import Run
from live_migration.coordinator.source_jobs import pause_source_jobs
from live_migration.coordinator.statistics import read_statistics
from live_migration.coordinator.timescale_source import compressed_tables, publish_inner
from live_migration.producer.homes import Homes
from live_migration.producer.publication import (
    ALL_OPERATIONS,
    INSERT_ONLY,
    LockTimeout,
    Operations,
    PublishedTable,
    add_tables,
    create_publication,
    drop_publication,
    move_table,
    publications_present,
    published_tables,
    renew_decoding_catalog,
    set_identity_full,
    tables_without_identity,
)
from live_migration.producer.publisher import fence_producers
from live_migration.producer.slot import (
    SlotTimeout,
    await_older_transactions,
    create_slot,
    drop_slot,
    identify_system,
    read_slot,
)
from live_migration.producer.tail_check import read_tails

_STEP = "prepare"
_PLANNING_ATTEMPTS = 20
_TOPIC_ATTEMPTS = 10
_CHANGED_MEANWHILE = (
    asyncpg.UndefinedTableError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.UndefinedObjectError,
    asyncpg.DuplicateObjectError,
)
"""A table is gone, or whoever watches identities has moved it from one publication into the other."""


async def prepare(run: Run) -> None:
    """Make what the change log needs on Kafka and the source, then enter phase `schema`."""
    claim = await read_claim(run.target)
    async with run.source_session("prepare") as source:
        if claim.is_begun:
            await _require_ours(run, source, claim)
            run.reporter.note("preparing again: what an earlier attempt left on the source is made anew")
            await drop_built_indexes(run)
            await _remove_ours(run, source)
            await _make_topics_anew(run.settings, claim)
        else:
            # Looked at first: once the step is recorded, what is there is taken for ours.
            await _require_nothing_there(source, run.settings)
            await kafka.require_no_topics(run.settings)
            async with run.target_transaction("beginning to prepare") as target:
                await steps.begin(target, _STEP)
            await _create_topics(run.settings, claim)
        try:
            await _prepare_source(run, source)
        except (SlotTimeout, LockTimeout) as error:
            await _remove_ours(run, source)
            for line in await give_back(run.target, source, run.settings):
                run.reporter.note(line)
            if isinstance(
                error, LockTimeout
            ):  # to begin anew would publish every table again, and wait for the same one
                raise SourceError(error.message, hint=error.hint) from error
            raise


async def _prepare_source(run: Run, source: asyncpg.Connection) -> None:
    settings = run.settings
    identity = await identify_system(settings.source_uri())
    if identity.system_identifier != run.migration.source_system:
        raise SourceError(
            f"the source is another cluster now: {identity.system_identifier}, was {run.migration.source_system}",
            hint="Check SOURCE, or `live-migration clean` and start again.",
        )
    await _create_publication(run, source, settings.publication, ALL_OPERATIONS)
    await _create_publication(run, source, settings.insert_publication, INSERT_ONLY)
    await publish_inner(run, source)
    if settings.pause_source_jobs:
        await pause_source_jobs(run, source)
    if settings.replica_identity_full:
        await _give_full_identities(run, source)
    with asking("target", "reading the plan"):
        planned = await planned_tables(run.target)
    members = await publish_tables(run, source, only=planned)
    _announce(run, members)
    await beside(_begin_change_log(run, source, identity.timeline, members), [watch_identities(run)])


async def _create_publication(run: Run, source: asyncpg.Connection, name: str, operations: Operations) -> None:
    """Create a publication that the state knows for ours as soon as it is there."""

    async def announce(oid: int) -> None:
        async with run.target_transaction(f"recording publication {name}") as target:
            await record_publication(target, oid, name)

    await create_publication(source, name, operations, announce=announce)


async def _begin_change_log(run: Run, source: asyncpg.Connection, timeline: int, members: Memberships) -> None:
    """Make the slot, which may wait long for open transactions, and enter phase `schema`.

    The change log begins behind all that ran while the slot was made, and is in the copies then: the catalog by which that is decoded may be
    too old. PostgreSQL (18.6) was seen to end the stream so for a truncated table, and to leave out an added column's values without a word.
    """
    settings, reporter = run.settings, run.reporter

    async def outwait(what: str) -> None:
        await await_older_transactions(source, timeout=settings.slot_timeout, on_wait=reporter.note, what=what)

    await create_slot(settings.source_uri(), settings.slot, timeout=settings.slot_timeout, on_wait=reporter.note)
    await renew_decoding_catalog(source, settings.publication)
    await outwait("the beginning of the change log")
    homes = await _read_homes(run, source, {})
    with asking("source", "reading the WAL position"):
        lsn = int(await source.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))
    reporter.note(f"slot {settings.slot} made, the change log begins at {Lsn(lsn)}")
    await outwait("the first table snapshot")  # what committed below stands in the WAL, but may not be visible yet
    homes = await _read_homes(run, source, homes.learnt)  # what was made before the log begins, and is not in the first
    await write_homes(settings, homes.learnt)
    statistics = await read_statistics(source)
    await _enter_schema(run, lsn, timeline, members, statistics, has_timescale=homes.is_used)


async def _read_homes(run: Run, source: asyncpg.Connection, learnt: control.Homes) -> Homes:
    """Give where chunks belong: any may be gone when the producer comes to its changes."""
    return Homes(await run.patiently("reading the hypertables", lambda: read_layout(source)), learnt)


async def _enter_schema(
    run: Run, start_lsn: int, timeline: int, members: Memberships, statistics: str | None, *, has_timescale: bool
) -> None:
    # TimescaleDB's catalog is read from the stream as text, and a walsender cannot send compressed rows in binary form.
    binary = not has_timescale and all(table.is_binary_safe for table in (*members.all, *members.insert))
    async with run.target_transaction("leaving phase prepare") as target:
        await target.execute(
            """update _live_migration.migration set start_lsn = $2, source_timeline = $3, binary_stream = $4
               where epoch = $1""",
            run.epoch,
            start_lsn,
            timeline,
            binary,
        )
        await adopt_memberships(target, members, statistics)
        await steps.finish(target, run.epoch, _STEP)
        await run.enter(Phase.SCHEMA)
    await run.reload()
    # Last, for producers begin at once, and what they began with is never made anew now.
    await write_config(run.settings, producer_config(run.settings, run.migration))


async def _require_nothing_there(source: asyncpg.Connection, settings: Settings) -> None:
    """Refuse whatever bears our names, for nothing of ours can be there yet."""
    with asking("source", "looking for slot and publications of our name"):
        slot = await read_slot(source, settings.slot)
        publications = await publications_present(source, [settings.publication, settings.insert_publication])
    if slot is not None:
        raise SlotError(
            f"slot {settings.slot} exists on the source already, and is not this migration's",
            hint="Choose another --name, or drop the slot if nobody needs it.",
        )
    if publications:
        raise SourceError(
            f"publications exist on the source already: {', '.join(publications)}",
            hint="Choose another --name, or drop them if nobody needs them.",
        )


async def _require_ours(run: Run, source: asyncpg.Connection, claim: Claim) -> None:
    await require_ours_on_source(source, run.settings, claim)
    await require_our_topics(run.settings, claim)


async def _remove_ours(run: Run, source: asyncpg.Connection) -> None:
    """Drop slot and publications unless a successor may have made its own under the same names by now."""
    with asking("target", "looking whether we are still the coordinator"):
        await steps.require_role(run.target, run.epoch)
    await require_ours_on_source(source, run.settings, await read_claim(run.target))
    await remove_from_source(source, run.settings)


async def remove_from_source(source: asyncpg.Connection, settings: Settings) -> list[str]:
    """Drop slot and publications where they exist; give what was dropped."""
    dropped = []
    if await drop_slot(source, settings.slot):
        dropped.append(f"slot {settings.slot}")
    for name in (settings.publication, settings.insert_publication):
        if await drop_publication(source, name, lock_timeout=settings.lock_timeout):
            dropped.append(f"publication {name}")
    return dropped


async def _create_topics(settings: Settings, claim: Claim) -> None:
    await kafka.create_topics(settings)
    await sign_topics(settings, claim.migration_id)


async def _make_topics_anew(settings: Settings, claim: Claim) -> None:
    """Delete and make the topics, until nothing stands in them that a producer of the log before has written."""
    for _ in range(_TOPIC_ATTEMPTS):
        await kafka.delete_topics(settings)
        await _await_topics_gone(settings)
        await _create_topics(settings, claim)
        await fence_producers(
            settings
        )  # whoever began before can commit nothing from here on; whoever begins now waits for us
        tails = await read_tails(settings, settings.lane_map.lane_count)
        if all(tail.end_offset == 0 for tail in tails) and POSITION not in await kafka.read_control(settings):
            return
    raise KafkaError(
        f"somebody writes into {settings.changes_topic} while it is made anew", hint="Stop every other producer."
    )


async def _await_topics_gone(settings: Settings) -> None:
    """Wait until deleted topics are gone, which the broker does after it has answered."""
    async with kafka.admin(settings) as client:
        for _ in range(300):
            if not any([await kafka.topic_exists(client, t) for t in (settings.changes_topic, settings.control_topic)]):
                return
            await asyncio.sleep(0.1)
    raise KafkaError("the topics of an earlier attempt do not go away", hint="Look at the broker's log.")


async def _give_full_identities(run: Run, source: asyncpg.Connection) -> None:
    """Give tables without identity REPLICA IDENTITY FULL where UPDATE and DELETE then succeed, recorded before."""
    version = run.migration.source_version
    for table in planning.assign(await run.list_tables(source), version).insert:
        if table.part != "chunk" and planning.may_become_full(table, version):  # chunks have it from their hypertable
            await _give_full_identity(run, source, run.target, table)
            run.reporter.note(f"{table.name} has REPLICA IDENTITY FULL until `clean`")


async def _give_full_identity(
    run: Run,
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    table: TableInfo,
    *,
    patience: float | None = None,
) -> None:
    with asking("target", "recording a change on the source"):
        await target.execute(
            """insert into _live_migration.source_changes (kind, oid, object, before, after)
               select 'replica_identity', $1, $2, $3, 'f'
               where not exists (select from _live_migration.source_changes
                                 where kind = 'replica_identity' and oid = $1 and not restored)""",
            table.oid,
            str(table.name),
            table.identity.value,
        )
    await set_identity_full(
        source,
        PublishedTable(table.oid, table.name),
        lock_timeout=run.settings.lock_timeout,
        patience=patience,
    )


async def publish_compressed(
    run: Run,
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    tables: Sequence[TableInfo],
    *,
    patience: float | None = None,
) -> None:
    """Publish the tables of compressed rows, FULL: a change there that no marker encloses is one that the stream does not tell.

    Raises:
        LockTimeout: one of them is locked for longer than `patience` seconds.
    """
    present = await published_tables(source, run.settings.publication)
    wanted = [table for table in compressed_tables(tables) if table.oid not in present]
    names = [
        PublishedTable(table.oid, table.name)
        for table in wanted
        if table.identity is ReplicaIdentity.FULL
        or await _may_be_watched(run, source, target, table, patience=patience)
    ]
    lock_timeout = run.settings.lock_timeout
    await add_tables(source, run.settings.publication, names, lock_timeout=lock_timeout, patience=patience)


async def _may_be_watched(
    run: Run,
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    table: TableInfo,
    *,
    patience: float | None,
) -> bool:
    """Give a table of compressed rows REPLICA IDENTITY FULL; False where TimescaleDB refuses: before 2.29 to all but superusers."""
    try:
        await _give_full_identity(run, source, target, table, patience=patience)
    except SourceError as error:
        if not isinstance(error.__cause__, asyncpg.InsufficientPrivilegeError):
            raise
        run.reporter.warn_on_change(
            "compressed rows",
            "this TimescaleDB lets no one but a superuser watch compressed rows: delete no whole batches of them on the source",
        )
        return False
    return True


async def publish_tables(run: Run, source: asyncpg.Connection, *, only: frozenset[int] | None = None) -> Memberships:
    """Bring the source's tables, or `only` those with these oids, into our two publications; give who is where.

    A table whose identity is lost between looking and publishing is moved at once, one that vanishes is let go.
    """
    settings, version = run.settings, run.migration.source_version
    for _ in range(_PLANNING_ATTEMPTS):
        found = await run.list_tables(source)
        considered = [t for t in found if only is None or not planning.is_followed(t) or t.oid in only]
        members = planning.assign(considered, version)
        try:
            for name, tables in ((settings.publication, members.all), (settings.insert_publication, members.insert)):
                other = await published_tables(source, _other(settings, name))
                wanted = [PublishedTable(t.oid, t.name) for t in tables if t.oid not in other]
                await add_tables(source, name, wanted, lock_timeout=settings.lock_timeout)
            await publish_compressed(run, source, run.target, found)
            refuses_generated = version >= planning.GENERATED_IN_FULL
            lost = await tables_without_identity(source, settings.publication, refuses_generated=refuses_generated)
            for table in lost:
                await drop_from_publication(source, settings, table)
        except SourceError as error:
            if not isinstance(error.__cause__, _CHANGED_MEANWHILE):
                raise
            continue
        if not lost and not await _unpublished(source, settings, members):
            return members
    raise SourceError("tables on the source come and go faster than they can be published", hint="Try again later.")


async def drop_from_publication(source: asyncpg.Connection, settings: Settings, table: PublishedTable) -> None:
    """Move a table without identity into the publication of inserts."""
    await move_table(
        source, table, settings.publication, settings.insert_publication, lock_timeout=settings.lock_timeout
    )


async def _unpublished(source: asyncpg.Connection, settings: Settings, members: Memberships) -> list[TableInfo]:
    published = {
        **await published_tables(source, settings.publication),
        **await published_tables(source, settings.insert_publication),
    }
    return [table for table in (*members.all, *members.insert) if table.oid not in published]


def _other(settings: Settings, name: str) -> str:
    return settings.insert_publication if name == settings.publication else settings.publication


def _announce(run: Run, members: Memberships) -> None:
    """Name the tables that are not followed like others."""
    if members.insert:
        run.reporter.warning(
            f"{len(members.insert)} tables have no usable replica identity; only INSERT and TRUNCATE on them are followed, "
            f"an UPDATE or DELETE there is not: {_names(members.insert)}"
        )
    if members.unlogged:
        size = format_bytes(sum(table.size_bytes for table in members.unlogged))
        run.reporter.warning(
            f"{len(members.unlogged)} unlogged tables ({size}) are not in the WAL and are copied at the cutover: "
            f"{_names(members.unlogged)}"
        )
    run.reporter.note(f"{len(members.all) + len(members.insert)} tables published")


def _names(tables: Sequence[TableInfo]) -> str:
    return ", ".join(str(table.name) for table in tables)
