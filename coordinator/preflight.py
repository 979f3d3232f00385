"""Every check of `validate`: looks at source, target, broker and client programs, and touches nothing."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from importlib.resources import files

import asyncpg
from aiokafka import errors as kafka_errors
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_fixed

from live_migration.common import kafka, postgres, state
from live_migration.common.catalog import USERS_OWN, list_tables
from live_migration.common.errors import LiveMigrationError, SourceError, TargetError, UsageError
from live_migration.common.postgres import CONNECTION_ERRORS, Side
from live_migration.common.progress import name_list
from live_migration.common.settings import Settings
from live_migration.common.timescale import read_version, read_version_to_be
from live_migration.coordinator import (
    client_programs,
    findings,
    late_findings,
    source_findings,
    timescale_facts,
    timescale_findings,
)
from live_migration.coordinator.batch_findings import find_batches
from live_migration.coordinator.big_rows import assess_big_rows, find_big_rows
from live_migration.coordinator.database_findings import find_databases
from live_migration.coordinator.findings import Finding
from live_migration.coordinator.hypertable_findings import find_hypertables
from live_migration.coordinator.lane_findings import find_lanes
from live_migration.producer.replication import ReplicationConnection

_PATIENCE_SECONDS = 30.0
"""How long a check is made again while somebody holds a table's lock."""

_SERVER = """
    select current_setting('server_version_num')::int as version,
           (select system_identifier::text from pg_control_system()) as system_identifier,
           pg_postmaster_start_time()::text as started_at, current_database()::text as database,
           (select pg_encoding_to_char(encoding)::text from pg_database where datname = current_database()) as encoding,
           pg_is_in_recovery() as is_standby, current_setting('default_transaction_read_only')::bool as is_read_only
"""

_SOURCE = f"""
    select current_setting('wal_level') as wal_level,
           (select count(*) from pg_replication_slots)::int as slots,
           current_setting('max_replication_slots')::int as max_slots,
           (select count(*) from pg_stat_activity where backend_type = 'walsender')::int as senders,
           current_setting('max_wal_senders')::int as max_senders,
           (select case when setting = '-1' then -1 else setting::bigint * 1024 * 1024 end
            from pg_settings where name = 'max_slot_wal_keep_size') as max_slot_wal_keep_bytes,
           (select setting::bigint from pg_settings where name = 'wal_sender_timeout') as wal_sender_timeout_ms,
           coalesce(current_setting('idle_replication_slot_timeout', true), '') as idle_slot_timeout,
           pg_database_size(current_database()) as database_bytes,
           (select count(*) from pg_class c join pg_namespace n on n.oid = c.relnamespace
            where c.relkind in ('r', 'p') and n.nspname not in ('pg_catalog', 'pg_toast', 'information_schema')) as tables,
           {timescale_facts.LOCKS} as locks
"""

_ROLE = f"""
    with tables as (
        select c.oid, n.nspname || '.' || c.relname as name, c.relowner, c.relpersistence
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind = 'r' and c.relpersistence in ('p', 'u') and {USERS_OWN}
    )
    select r.rolname::text as name, r.rolsuper as is_superuser,
           r.rolreplication or exists (select from pg_roles m where m.rolname = 'rds_replication'
                                       and pg_has_role(m.oid, 'member')) as can_replicate,
           has_database_privilege(current_database(), 'create') as can_create,
           coalesce((select array_agg(name order by name) from tables
                     where relpersistence = 'p' and not pg_has_role(relowner, 'usage')), '{{}}') as not_owned,
           coalesce((select array_agg(name order by name) from tables
                     where not has_table_privilege(oid, 'select')), '{{}}') as not_readable,
           coalesce((select array_agg(name order by name) from tables where row_security_active(oid)), '{{}}') as row_secured
    from pg_roles r where r.rolname = current_user
"""

_PREPARED = """
    select gid, extract(epoch from clock_timestamp() - prepared)::float8 as age_seconds
    from pg_prepared_xacts order by prepared
"""

_LARGE_OBJECTS = """
    select (select count(*) from pg_largeobject_metadata) as count, pg_table_size('pg_catalog.pg_largeobject') as size_bytes
"""

_LEFTOVERS = """
    select exists (select from pg_replication_slots where slot_name = $1) as slot_exists,
           (select active_pid from pg_replication_slots where slot_name = $1) as active_pid,
           coalesce((select array_agg(pubname::text order by pubname) from pg_publication
                     where pubname = any($2::text[])), '{}') as publications
"""

_SCHEMAS_WITHOUT_CREATE = """
    select coalesce(array_agg(nspname::text order by nspname), '{}') from pg_namespace
    where nspname = any($1::text[]) and not has_schema_privilege(oid, 'create')
"""

_SCHEMAS = f"""
    select array_agg(distinct n.nspname::text) from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'v', 'm', 'S', 'f') and {USERS_OWN}
"""


async def _chunk_schemas(source: asyncpg.Connection, target: asyncpg.Connection) -> set[str]:
    """Give the schema in which TimescaleDB makes chunks itself, by its own rights, unless they are to come over as they are."""
    version = await read_version(source)
    if version is None or await read_version_to_be(target, version) == version:
        return set()
    return {"_timescaledb_internal"}


async def validate(settings: Settings) -> list[Finding]:
    """Run every check and give what was found, errors first; a check that fails is a finding and hides no other.

    Without `settings.kafka` the broker is left out, for `migrate` then runs one of its own. Where the target holds
    this migration's state already, what it made is no finding.

    Raises:
        UsageError: source or target is not given.
    """
    settings.source_uri()
    settings.target_uri()
    async with AsyncExitStack() as stack:
        preflight = _Preflight(settings, stack)
        await preflight.run()
    return sorted(dict.fromkeys(preflight.findings), key=lambda finding: finding.level)


def require_clean(found: Sequence[Finding]) -> None:
    """Raise one LiveMigrationError that names every error among the findings; warnings pass."""
    errors = [finding for finding in found if finding.level == "error"]
    if not errors:
        return
    if len(errors) == 1:
        raise LiveMigrationError(errors[0].what, hint=errors[0].hint)
    lines = [f"\n  - {each.what}" + (f"\n    next: {each.hint}" if each.hint else "") for each in errors]
    raise LiveMigrationError(
        f"{len(errors)} things stand in the way:{''.join(lines)}",
        hint="Nothing was touched. Mend these and run it again.",
    )


async def _patiently(look: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    """Look again for a while when a table is locked, or dropped meanwhile: a TRUNCATE or a DDL that comes by is no finding."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception(_passes), stop=stop_after_delay(_PATIENCE_SECONDS), wait=wait_fixed(0.2), reraise=True
    ):
        with attempt:
            return await look()
    raise AssertionError


def _passes(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, LiveMigrationError) else error
    return isinstance(cause, postgres.LOCKED) or postgres.is_dropped_meanwhile(cause)


class _Preflight:
    def __init__(self, settings: Settings, stack: AsyncExitStack) -> None:
        self._settings = settings
        self._stack = stack
        self.findings: list[Finding] = []
        self._servers: dict[Side, findings.ServerFacts] = {}
        self._migration: state.Migration | None = None
        self._is_binary_safe: bool | None = None

    async def run(self) -> None:
        source, target = await asyncio.gather(self._connect("source"), self._connect("target"))
        if target:
            await self._check("target", self._read_state, target)
            await self._check("target", self._check_server, target, "target")
            await self._check("target", self._check_target, target)
        if source:
            await self._check("source", self._check_server, source, "source")
        if source and "source" in self._servers:  # else it has gone away meanwhile, which is a finding by now
            checks = (
                self._check_source,
                self._check_role,
                self._check_tables,
                self._check_big_rows,
                self._check_lanes,
                self._check_leftovers,
            )
            for check in checks:
                await self._check("source", check, source)
            await self._check("source", self._check_walsender)
            await self._check("source", self._check_programs)
        if source and target:
            await self._check("target", self._check_pair, source, target)
            await self._check("target", self._check_conflicts, source, target)
            await self._check("target", self._check_late, source, target)
            await self._check("target", find_databases, source, target)
            await self._check("source", self._check_timescale, source, target)
            await self._check("source", self._check_hypertables, source, target)
        if self._settings.kafka:
            await self._check("target", self._check_kafka)

    async def _check(self, side: Side, check: Callable[..., Awaitable[list[Finding]]], *arguments: object) -> None:
        try:
            self.findings += await _patiently(lambda: check(*arguments))
        except LiveMigrationError as error:
            self.findings.append(findings.error(error.message, error.hint))
        except asyncpg.PostgresError as error:
            translated = postgres.server_error(error, side, check.__name__.strip("_").replace("_", " "))
            self.findings.append(findings.error(translated.message, translated.hint))
        except kafka_errors.KafkaError as error:
            translated = kafka.translate(error, "looking at the topics")
            self.findings.append(findings.error(translated.message, translated.hint))
        except (*CONNECTION_ERRORS, asyncpg.InterfaceError) as error:
            self.findings.append(findings.error(f"the connection to the {side} broke: {error or type(error).__name__}"))

    async def _connect(self, side: Side) -> asyncpg.Connection | None:
        uri = self._settings.source_uri() if side == "source" else self._settings.target_uri()
        try:
            return await self._stack.enter_async_context(
                postgres.session(uri, side, application="live-migration validate")
            )
        except (SourceError, TargetError, UsageError, LiveMigrationError) as error:
            self.findings.append(findings.error(error.message, error.hint))
            return None

    async def _read_state(self, target: asyncpg.Connection) -> list[Finding]:
        found = await state.read_migration(target)
        if found is None:
            return []
        if found.name != self._settings.name:
            return [
                findings.error(
                    f"the target holds the state of another migration, {found.name}",
                    f"Give --name {found.name} to go on with it, or `live-migration clean --name {found.name}`.",
                )
            ]
        self._migration = found
        alive = await target.fetchval("select lease_until > clock_timestamp() from _live_migration.migration")
        if found.owner and alive:
            return [
                findings.error(
                    f"this migration is being run by {found.owner} already",
                    "Stop that one first; `live-migration status` shows it.",
                )
            ]
        phase = found.phase.value
        return [findings.warning(f"the target holds this migration in phase {phase}; `migrate` goes on with it")]

    async def _check_server(self, connection: asyncpg.Connection, side: Side) -> list[Finding]:
        row = await connection.fetchrow(_SERVER)
        facts = self._servers[side] = findings.ServerFacts(**dict(row))
        return findings.assess_server(side, facts)

    async def _check_source(self, source: asyncpg.Connection) -> list[Finding]:
        facts = source_findings.SourceFacts(**dict(await source.fetchrow(_SOURCE)))
        if self._migration:  # the slot and the walsender that it counts may be ours
            facts = dataclasses.replace(facts, slots=0, senders=0)
        return source_findings.assess_source(facts, self._servers["source"].encoding, self._settings.status_interval)

    async def _check_role(self, source: asyncpg.Connection) -> list[Finding]:
        row = dict(await source.fetchrow(_ROLE))
        for names in ("not_owned", "not_readable", "row_secured"):
            row[names] = tuple(row[names])
        return source_findings.assess_role(source_findings.RoleFacts(**row), self._servers["source"].database)

    async def _check_tables(self, source: asyncpg.Connection) -> list[Finding]:
        async with source.transaction(readonly=True):
            # Reading a table's size takes a lock.
            await source.execute(postgres.set_lock_timeout(self._settings.lock_timeout))
            tables = await list_tables(source)
        self._is_binary_safe = all(table.is_binary_safe for table in tables if table.persistence == "p")
        found = source_findings.assess_tables(tables, replica_identity_full=self._settings.replica_identity_full)
        target = self._servers.get("target")
        found += source_findings.assess_short_names(
            tables, self._servers["source"].encoding, target.encoding if target else "UTF8"
        )
        objects = await source.fetchrow(_LARGE_OBJECTS)
        found += source_findings.assess_large_objects(objects["count"], objects["size_bytes"])
        prepared = [source_findings.PreparedTransaction(**dict(row)) for row in await source.fetch(_PREPARED)]
        return found + source_findings.assess_prepared(prepared)

    async def _check_big_rows(self, source: asyncpg.Connection) -> list[Finding]:
        if self._migration or self._is_binary_safe is None:
            return []  # its copies and its stream say so themselves; or nobody knows the form they would have
        is_binary = self._is_binary_safe and await read_version(source) is None
        return assess_big_rows(await find_big_rows(source, is_binary=is_binary), is_binary=is_binary)

    async def _check_lanes(self, source: asyncpg.Connection) -> list[Finding]:
        if self._migration:
            return []  # fixed since its beginning
        return await find_lanes(self._settings, source)

    async def _check_leftovers(self, source: asyncpg.Connection) -> list[Finding]:
        if self._migration:
            system = self._servers["source"].system_identifier, self._servers["source"].database
            if system == (self._migration.source_system, self._migration.source_database):
                return []
            return [
                findings.error(
                    f"the migration on the target copies from {self._migration.source_address}, which is not this source",
                    "Check SOURCE, or `live-migration clean` first.",
                )
            ]
        names = self._publications
        row = await source.fetchrow(_LEFTOVERS, self._settings.slot, names)
        return findings.assess_leftovers(self._settings.slot, **dict(row))

    async def _check_walsender(self) -> list[Finding]:
        """Open a replication connection, which a pooler or pg_hba.conf may refuse where it lets others in."""
        try:
            async with await ReplicationConnection.open(self._settings.source_uri()):
                return []
        except LiveMigrationError as error:
            return [
                findings.error(
                    f"the source refuses a replication connection: {error.message}",
                    "Connect to the server itself, not to a pooler; see pg_hba.conf and max_wal_senders.",
                )
            ]

    async def _check_programs(self) -> list[Finding]:
        await client_programs.find(self._settings, self._servers["source"].major)
        return []

    async def _check_target(self, target: asyncpg.Connection) -> list[Finding]:
        found = []
        role = await target.fetchval("select current_user::text")
        if not await target.fetchval("select has_database_privilege(current_database(), 'create')"):
            found.append(
                findings.error(
                    f"role {role} on the target lacks CREATE on the database",
                    f"`grant create on database … to {role}`, or make it the owner.",
                )
            )
        if not await postgres.replica_role(target):
            found.append(
                findings.warning(
                    f"role {role} on the target may not set session_replication_role: triggers and rules that somebody makes on the target's tables "
                    "before the cutover fire for each row that is copied or applied; the source's own come after the last barrier",
                    f"Make none, or from version 15: `grant set on parameter session_replication_role to {role}`; else use a superuser.",
                )
            )
        return found

    async def _check_pair(self, source: asyncpg.Connection, target: asyncpg.Connection) -> list[Finding]:
        if len(self._servers) < 2:
            return []
        found = findings.assess_pair(self._servers["source"], self._servers["target"])
        rows = await source.fetch(_query("extensions"))
        extensions = [findings.Extension(**dict(row)) for row in rows if row["name"] != "timescaledb"]
        available = await target.fetch("select name::text from pg_available_extensions")
        found += findings.assess_extensions(extensions, frozenset(row["name"] for row in available))
        schemas = set(await source.fetchval(_SCHEMAS) or []) - await _chunk_schemas(source, target)
        if closed := await target.fetchval(_SCHEMAS_WITHOUT_CREATE, list(schemas)):
            names = name_list(closed)
            found.append(
                findings.error(
                    f"the target's role lacks CREATE on schemas: {names}", f"`grant create on schema {names} to …`."
                )
            )
        return found

    async def _check_conflicts(self, source: asyncpg.Connection, target: asyncpg.Connection) -> list[Finding]:
        if self._migration or self._is_same_database():
            return []
        ours, theirs = [
            {f"{row['kind']} {row['name']}" for row in await each.fetch(_query("objects"))} for each in (source, target)
        ]
        return findings.assess_conflicts(sorted(ours & theirs))

    async def _check_late(self, source: asyncpg.Connection, target: asyncpg.Connection) -> list[Finding]:
        missing = await late_findings.find_missing_roles(source, target)
        found = late_findings.assess_roles(missing, is_begun=self._migration is not None)
        privileged = await late_findings.find_privileged(source, target, self._publications)
        found += late_findings.assess_privileged(privileged)
        found += late_findings.assess_unreadable(await late_findings.find_unreadable(source))
        if self._migration or self._is_same_database():
            return found
        return found + late_findings.assess_taken_oids(await late_findings.find_taken_oids(source, target))

    @property
    def _publications(self) -> list[str]:
        return [self._settings.publication, self._settings.insert_publication]

    async def _check_timescale(self, source: asyncpg.Connection, target: asyncpg.Connection) -> list[Finding]:
        async with source.transaction(readonly=True):
            await source.execute(postgres.set_lock_timeout(self._settings.lock_timeout))
            facts = await timescale_facts.read_source(source, self._publications)
        if facts is None:
            return []
        begun = self._migration
        pause = self._settings.pause_source_jobs or bool(begun and begun.settings.get("pause_source_jobs"))
        accepts = self._settings.accept_unseen_changes or begun is not None
        flatten = self._settings.flatten if begun is None else bool(begun.settings.get("flatten"))
        theirs = await timescale_facts.read_target(target, facts)
        found = timescale_findings.assess_source(facts, accept_unseen_changes=accepts)
        found += timescale_findings.assess_target(
            facts, theirs, flatten=flatten, pause_source_jobs=pause, is_begun=begun is not None
        )
        if begun is None and not flatten and timescale_findings.is_same_version(facts, theirs):
            found += await find_batches(source, target)
        return found

    async def _check_hypertables(self, source: asyncpg.Connection, target: asyncpg.Connection) -> list[Finding]:
        if self._migration:
            return []  # they are there, or as good as
        return await find_hypertables(self._settings, source, target)

    def _is_same_database(self) -> bool:
        return len(self._servers) == 2 and findings.is_same_database(self._servers["source"], self._servers["target"])

    async def _check_kafka(self) -> list[Finding]:
        if self._migration:
            await kafka.check_topics(self._settings, self._migration.lane_count)
            return []
        async with kafka.admin(self._settings) as client:
            topics = [self._settings.changes_topic, self._settings.control_topic]
            brokers = len((await client.describe_cluster())["brokers"])
            present = [topic for topic in topics if await kafka.topic_exists(client, topic)]
        found = findings.assess_topics(present)
        return found + findings.assess_brokers(brokers, self._settings.replication_factor)


def _query(name: str) -> str:
    return files("live_migration.coordinator").joinpath(f"sql/{name}.sql").read_text()
