"""Phase `schema`: the plan of all tables, indexes and foreign keys, and the schema's first part on the target.

One exported snapshot of the source serves pg_dump and our own catalog queries and is let go at once. The archive is
kept in the state with the plan, in one transaction; then its entries are run in batches whose progress is
committed with them. Thus the phase can be entered again after a crash at any point, on any host.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from live_migration.common.catalog import CURRENT_TIMELINE, TableInfo, list_tables
from live_migration.common.errors import LiveMigrationError, SourceError
from live_migration.common.postgres import asking
from live_migration.common.relation import QualifiedName
from live_migration.common.settings import Settings
from live_migration.common.state import Phase
from live_migration.coordinator import archives, client_programs, planning, steps
from live_migration.coordinator.client_programs import ClientPrograms, ProgramError
from live_migration.coordinator.definitions import ARCHIVE as DEFINITIONS_ARCHIVE
from live_migration.coordinator.definitions import encode, read_definitions_of_all
from live_migration.coordinator.dump_script import (
    PG_CLASS,
    PG_CONSTRAINT,
    PG_PUBLICATION,
    PG_PUBLICATION_NAMESPACE,
    PG_PUBLICATION_REL,
    PG_TRIGGER,
    Entry,
    parse_script,
)
from live_migration.coordinator.entries import run_entries
from live_migration.coordinator.hypertable_entries import part_entries, without_only
from live_migration.coordinator.made_definitions import ARCHIVE as MADE_ARCHIVE
from live_migration.coordinator.made_definitions import Made, load_made, read_made
from live_migration.coordinator.made_schema import make_schema
from live_migration.coordinator.planning import Moment
from live_migration.coordinator.post_data import PostData, sort_post_data
from live_migration.coordinator.prepare import publish_tables
from live_migration.coordinator.recopy import release_tables
from live_migration.coordinator.run import Run
from live_migration.coordinator.statistics import STATISTICS
from live_migration.coordinator.timescale_catalog import ARCHIVE as CATALOG_ARCHIVE
from live_migration.coordinator.timescale_catalog import Catalog, begin_restoring, read_catalog, restore_catalog
from live_migration.coordinator.timescale_source import can_watch_compressed
from live_migration.producer.publication import published_tables
from live_migration.producer.slot import await_older_transactions

ARCHIVE = "schema"
PRE_DATA = "pre-data"
_PLAN = "plan"
_LATE = "late tables"
"""Begun once a table was published after the log's beginning."""
_KEYS = "keys"
PUBLISHING_ATTEMPTS = 30
"""Looks at a source whose tables come faster than they are published."""

_INDEXES = """
    select i.indexrelid as oid, i.indrelid as table_oid, c.relname as name, t.relkind::text as table_kind,
           con.oid as constraint_oid, i.indisprimary as is_primary, i.indisunique as is_unique,
           exists (select from pg_inherits h where h.inhrelid = i.indexrelid) as is_attached,
           coalesce(pg_relation_size(i.indexrelid), 0) as size_bytes  -- null for one that was dropped since the snapshot
    from pg_index i join pg_class c on c.oid = i.indexrelid join pg_class t on t.oid = i.indrelid
    left join pg_constraint con on con.conindid = i.indexrelid and con.conrelid = i.indrelid and con.contype in ('p', 'u', 'x')
    where t.relkind in ('r', 'p') and t.relnamespace not in (select oid from pg_namespace where nspname like 'pg\\_%')
"""
FOREIGN_KEYS = """
    select con.oid, con.conrelid as table_oid, n.nspname as schema_name, c.relname as table_name, con.conname as name,
           c.relkind = 'p' as is_partitioned, con.convalidated as is_valid
    from pg_constraint con join pg_class c on c.oid = con.conrelid join pg_namespace n on n.oid = c.relnamespace
    where con.contype = 'f'
"""
_TABLES_IN_SCHEMA = 150_000
_SCHEMA_MEMBERS = "select oid from pg_publication_namespace where pnpubid = any($1::oid[])"
_TRIGGERS = "select oid, tgrelid as table_oid from pg_trigger where not tgisinternal"
MOMENT = f"""
    select pg_current_snapshot()::text as snapshot, pg_current_wal_insert_lsn() as horizon, {CURRENT_TIMELINE} as timeline, {STATISTICS} as statistics
"""
_OUR_PUBLICATIONS = """
    select p.oid, (select array_agg(r.oid) from pg_publication_rel r where r.prpubid = p.oid) as members
    from pg_publication p
    where p.pubname = any($1::text[]) or exists (
        select from pg_replication_slots s join pg_publication i on i.pubname = s.slot_name || '_insert'
        where s.plugin = 'pgoutput' and s.database = current_database() and not i.pubupdate and p.pubname in (s.slot_name, i.pubname))
"""
"""Those of another migration from the same source included: it names slot and publications as we do."""


INSERT_TABLE = "insert into _live_migration.tables ({}) values ({})".format(
    ", ".join(planning.TABLE_COLUMNS), ", ".join(f"${n}" for n in range(1, len(planning.TABLE_COLUMNS) + 1))
)
_READY_WITHOUT_INDEX = """
    update _live_migration.tables t set state = 'ready'
    where kind = 'hypertable' and not exists (select from _live_migration.indexes i where i.table_oid = t.oid)
"""


@dataclass(frozen=True, slots=True)
class SourceSchema:
    """What the planning snapshot showed."""

    tables: list[TableInfo]
    indexes: list[asyncpg.Record]
    foreign_keys: list[asyncpg.Record]
    left_out: frozenset[tuple[int, int]]
    """(catalog, oid) of what must not come to the target: our publications, and triggers of chunks, which their hypertable's make."""
    moment: Moment
    catalog: Catalog | None
    """TimescaleDB's, where it comes over whole."""
    definitions: bytes
    """What tables, views, functions and types are like, to be compared with at the cutover."""
    made: Made | None = None
    """Hypertables that are made anew."""

    @property
    def followed(self) -> list[TableInfo]:
        """The tables that have a row in the plan."""
        absent = {table.oid for table in self.tables if self.is_left_out(table)}
        return [table for table in self.tables if planning.is_followed(table) and table.hypertable not in absent]

    def is_left_out(self, table: TableInfo) -> bool:
        """Tell whether it is a hypertable that the target does not get."""
        return self.made is not None and table.part == "hypertable" and table.name in self.made.absent

    @property
    def index_owners(self) -> dict[int, int]:
        """Whose row in the plan the indexes of a table belong to, by oid: those of compressed rows to the chunk's."""
        if self.made is not None:  # those of chunks, and of aggregates' rows, come with their hypertables
            hidden = self.made.materializations
            return {t.oid: t.oid for t in self.followed if t.part != "chunk" and t.name not in hidden}
        own = {table.oid: table.oid for table in self.followed}
        return own | {table.compressed: table.oid for table in self.followed if table.compressed is not None}


async def restore_schema(run: Run) -> None:
    """Plan the migration and make the schema's first part on the target, then enter phase `copy`."""
    programs = await client_programs.find(run.settings, run.migration.source_version // 10_000)
    if not await steps.is_done(run.target, _PLAN):
        await _plan(run, programs)
    entries = await read_entries(run, programs, PRE_DATA)
    run.reporter.note(f"restoring the schema: {len(entries)} objects")
    if (made := await load_made(run.target)) is not None:
        await make_schema(run, made, entries, step=PRE_DATA)
    else:
        await begin_restoring(run)
        await run_entries(run, PRE_DATA, entries)
        await restore_catalog(run)
    async with run.target_transaction("leaving phase schema"):
        await release_tables(run)
        await run.enter(Phase.COPY)
    await run.reload()


async def read_entries(run: Run, programs: ClientPrograms, section: str) -> list[Entry]:
    """Give the entries of a section of the archive in the state."""
    with asking("target", "reading the schema's archive"):
        content = await archives.read(run.target, ARCHIVE)
    assert content is not None  # it is kept before this phase begins
    try:
        with private_folder(run.settings) as folder:
            archive = Path(folder, "schema.dump")
            await asyncio.to_thread(archive.write_bytes, content)
            return parse_script(await client_programs.write_script(programs, archive, section=section))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise  # of a program
        raise FolderError(
            f"the schema's archive cannot be written into {run.settings.dir}: {error.strerror or error}",
            hint="Make room there, or give another --dir, then run `live-migration migrate` again.",
        ) from error


class FolderError(LiveMigrationError):
    """The folder of ours on this host takes no file."""


def private_folder(settings: Settings) -> tempfile.TemporaryDirectory[str]:
    settings.dir.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="schema-", dir=settings.dir)  # 0700


async def _plan(run: Run, programs: ClientPrograms) -> None:
    """Save the plan and the archive, both of one snapshot in which every table is published."""
    async with run.source_session("schema") as source:
        with private_folder(run.settings) as folder:
            archive = Path(folder, "schema.dump")
            if await steps.is_begun(run.target, _LATE):  # a coordinator that died may have published and not waited
                await _await_missed(run, source)
            for _ in range(PUBLISHING_ATTEMPTS):
                schema = await run.patiently("reading the schema", lambda: _look(run, source, programs, archive))
                if schema is not None:
                    break
                await _publish_newcomers(run, source)
            else:
                raise SourceError(
                    "tables on the source come faster than they can be published", hint="Try again later."
                )
            content = await asyncio.to_thread(archive.read_bytes)
            post_data = parse_script(await client_programs.write_script(programs, archive, section="post-data"))
            if schema.made is not None:
                post_data = [without_only(entry, schema.made.roots) for entry in post_data]
            published_all = await published_tables(source, run.settings.publication)
    await _save_plan(run, schema, content, post_data, frozenset(published_all))


async def _look(run: Run, source: asyncpg.Connection, programs: ClientPrograms, archive: Path) -> SourceSchema | None:
    """Dump the schema and read the catalogs in one snapshot; None when it shows a table that is not published, or one is dropped meanwhile."""
    settings = run.settings
    async with source.transaction(isolation="repeatable_read", readonly=True):
        snapshot = await source.fetchval("select pg_export_snapshot()")
        moment = Moment(**dict(await source.fetchrow(MOMENT)))
        tables = await list_tables(source)
        published = {
            **await published_tables(source, settings.publication),
            **await published_tables(source, settings.insert_publication),
        }
        watches = await can_watch_compressed(source)
        wanted = [t for t in tables if planning.is_followed(t) or (watches and t.part == "compressed")]
        if any(table.oid not in published for table in wanted):
            return None
        try:
            await dump(run, programs, archive, snapshot)
        except ProgramError as error:
            if "does not exist" not in error.message:
                raise
            return None  # a chunk was dropped before pg_dump could lock it
        ours = await source.fetch(_OUR_PUBLICATIONS, [settings.publication, settings.insert_publication])
        indexes, foreign_keys = await source.fetch(_INDEXES), await source.fetch(FOREIGN_KEYS)
        triggers = await source.fetch(_TRIGGERS)
        schemas = []
        if run.migration.source_version >= _TABLES_IN_SCHEMA:
            schemas = await source.fetch(_SCHEMA_MEMBERS, [row["oid"] for row in ours])
        made = await read_made(settings, source, run.target)
        catalog = await read_catalog(source) if made is None else None
        definitions = await asyncio.to_thread(encode, await read_definitions_of_all(source))
    inner = {table.oid for table in tables if not table.is_users}
    left_out = {(PG_PUBLICATION_REL, member) for row in ours for member in row["members"] or ()}
    left_out |= {(PG_PUBLICATION, row["oid"]) for row in ours}
    left_out |= {(PG_PUBLICATION_NAMESPACE, row["oid"]) for row in schemas}
    left_out |= {(PG_TRIGGER, row["oid"]) for row in triggers if row["table_oid"] in inner}
    return SourceSchema(
        tables,
        indexes,
        [row for row in foreign_keys if row["table_oid"] not in inner and not (made and row["oid"] in made.left_out)],
        frozenset(left_out),
        moment,
        catalog,
        definitions,
        made,
    )


async def dump(
    run: Run, programs: ClientPrograms, archive: Path, snapshot: str, *, table: QualifiedName | None = None
) -> None:
    """Run pg_dump, again where it gave way at a lock that somebody holds."""
    uri, lock_timeout = run.settings.source_uri(), run.settings.lock_timeout
    for attempt in range(PUBLISHING_ATTEMPTS):
        try:
            await client_programs.dump_schema(
                programs, uri, archive, snapshot=snapshot, lock_timeout=lock_timeout, table=table
            )
            return
        except ProgramError as error:
            if "lock timeout" not in error.message or attempt == PUBLISHING_ATTEMPTS - 1:
                raise
            run.reporter.note("pg_dump gave way to somebody who locks a table on the source; trying again")
            await asyncio.sleep(min(0.5 * 2**attempt, 10))


async def _publish_newcomers(run: Run, source: asyncpg.Connection) -> None:
    """Publish tables made since `prepare`, and wait until no transaction can have missed it."""
    async with run.target_transaction("noting that tables came late") as target:
        await steps.begin(target, _LATE)
    await publish_tables(run, source)
    await _await_missed(run, source)


async def _await_missed(run: Run, source: asyncpg.Connection) -> None:
    await await_older_transactions(
        source, timeout=run.settings.slot_timeout, on_wait=run.reporter.note, what="publishing new tables"
    )
    await run.publications_changed(run.target)


async def _save_plan(
    run: Run, schema: SourceSchema, archive: bytes, post_data: Sequence[Entry], all_operations: frozenset[int]
) -> None:
    by_oid = {table.oid: table for table in schema.tables}
    rows = [
        planning.table_row(
            table,
            run.migration.lane_map,
            "all" if table.oid in all_operations else "insert",
            by_oid,
            schema.moment,
            schema.made.roots if schema.made else None,
            is_left_out=schema.is_left_out(table),
        )
        for table in schema.followed
    ]
    owners = schema.index_owners
    left_out = schema.made.left_out if schema.made else frozenset()
    wanted = [index for index in schema.indexes if index["oid"] not in left_out]
    async with run.target_transaction("saving the plan") as target:
        for name in ("tables", "indexes", "foreign_keys", "checkpoints", "archives"):
            await target.execute(f"delete from _live_migration.{name}")
        await target.executemany(INSERT_TABLE, rows)
        await target.executemany(
            """insert into _live_migration.indexes (oid, table_oid, name, is_primary, is_unique, size_bytes, statements)
               values ($1, $2, $3, $4, $5, $6, $7)""",
            plan_indexes(wanted, post_data, owners),
        )
        await target.execute(_READY_WITHOUT_INDEX)
        await target.executemany(
            """insert into _live_migration.foreign_keys
               (oid, schema_name, table_name, name, is_partitioned, is_valid, statement)
               values ($1, $2, $3, $4, $5, $6, $7)""",
            plan_foreign_keys(schema.foreign_keys, post_data),
        )
        await target.execute(
            "insert into _live_migration.checkpoints (lane) select generate_series(0, $1::int - 1)",
            run.migration.lane_count,
        )
        await target.execute("insert into _live_migration.archives values ($1, $2)", ARCHIVE, archive)
        await target.execute(
            "insert into _live_migration.archives values ($1, $2)", DEFINITIONS_ARCHIVE, schema.definitions
        )
        if schema.catalog is not None:
            await target.execute(
                "insert into _live_migration.archives values ($1, $2)", CATALOG_ARCHIVE, schema.catalog.encode()
            )
        if schema.made is not None:
            await target.execute(
                "insert into _live_migration.archives values ($1, $2)", MADE_ARCHIVE, schema.made.encode()
            )
        await target.execute(
            "insert into _live_migration.archives values ($1, $2)",
            _KEYS,
            plan_keys(schema).encode(),
        )
        await steps.finish(target, run.epoch, _PLAN)


@dataclass(frozen=True, slots=True)
class EntryKeys:
    """(catalog, oid) of archive entries that are not run like others: see `sort_post_data`."""

    built: frozenset[tuple[int, int]]
    roots: frozenset[tuple[int, int]]
    ours: frozenset[tuple[int, int]]

    def encode(self) -> bytes:
        return json.dumps({field: sorted(getattr(self, field)) for field in self.__slots__}).encode()

    @classmethod
    def decode(cls, content: bytes) -> EntryKeys:
        found = json.loads(content)
        return cls(*(frozenset((catalog, oid) for catalog, oid in found[field]) for field in cls.__slots__))


def plan_keys(schema: SourceSchema) -> EntryKeys:
    """Give the keys of index entries, by who makes them, and of what is left out."""
    built, roots = set(), set()
    owners = schema.index_owners
    empty_roots = {table.oid for table in schema.tables if table.part == "compressed root"}
    for index in schema.indexes:
        key = (PG_CONSTRAINT, index["constraint_oid"]) if index["constraint_oid"] else (PG_CLASS, index["oid"])
        if index["table_oid"] in owners:
            built.add(key)
        elif index["table_kind"] == "p" or index["is_attached"] or index["table_oid"] in empty_roots:
            roots.add(
                key
            )  # attached, and nobody's to build: a partition's that is unlogged, and empty until the cutover
    return EntryKeys(frozenset(built), frozenset(roots), schema.left_out)


async def read_post_data(run: Run) -> PostData:
    """Give the archive's post-data entries, sorted by when they are run."""
    programs = await client_programs.find(run.settings, run.migration.source_version // 10_000)
    with asking("target", "reading the plan"):
        content = await archives.read(run.target, _KEYS)
    assert content is not None  # it is kept together with the archive
    keys = EntryKeys.decode(content)
    entries = await read_entries(run, programs, "post-data")
    if (made := await load_made(run.target)) is not None:
        before, after = part_entries(entries, made.entries)
        entries = [without_only(entry, made.roots) for entry in (*before, *after)]
    return sort_post_data(entries, built=keys.built, roots=keys.roots, ours=keys.ours)


def plan_indexes(
    indexes: Sequence[asyncpg.Record], post_data: Sequence[Entry], owners: Mapping[int, int]
) -> list[tuple[object, ...]]:
    """Give rows for the indexes of migrated tables, each with the statements that pg_dump gives for it.

    `owners`: whose indexes in the plan those of a table are, by oid.
    """
    entries = {(entry.catalog, entry.oid): entry for entry in post_data}
    rows: list[tuple[object, ...]] = []
    for index in indexes:
        key = (PG_CONSTRAINT, index["constraint_oid"]) if index["constraint_oid"] else (PG_CLASS, index["oid"])
        entry = entries.get(key)
        # Without an entry it is an invalid index, which pg_dump leaves out, too.
        if entry is not None and (owner := owners.get(index["table_oid"])) is not None:
            fields = ("name", "is_primary", "is_unique", "size_bytes")
            rows.append((index["oid"], owner, *(index[field] for field in fields), [entry.statements]))
    return rows


def plan_foreign_keys(foreign_keys: Sequence[asyncpg.Record], post_data: Sequence[Entry]) -> list[tuple[object, ...]]:
    """Give rows for the foreign keys that pg_dump restores; those of partitions come with their root's."""
    by_oid = {row["oid"]: row for row in foreign_keys}
    fields = ("oid", "schema_name", "table_name", "name", "is_partitioned", "is_valid")
    # A hypertable takes no ONLY, and to all others it is the same: inheritance hands no foreign key down.
    return [
        (
            *(by_oid[entry.oid][field] for field in fields),
            entry.statements.replace("ALTER TABLE ONLY ", "ALTER TABLE ", 1),
        )
        for entry in post_data
        if entry.type == "FK CONSTRAINT" and entry.oid in by_oid
    ]
