"""What a source with TimescaleDB publishes beside its tables, so that no new chunk and no unseen change is missed.

- The setting `timescaledb.enable_chunk_auto_publication` (2.25 on) adds a new chunk to the publications of its hypertable.
- Where we may, the chunks' schemas are published, inserts alone, so that a chunk made by a session that lacks the setting is
  noticed; and the catalog tables that say what a chunk belongs to.
- Tables of compressed rows get REPLICA IDENTITY FULL and are published whole: a row event on one, outside the markers of a move,
  says that rows of its chunk changed unseen.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from live_migration.common import timescale
from live_migration.common.catalog import TableInfo
from live_migration.common.postgres import asking
from live_migration.common.relation import quote_identifier
from live_migration.common.timescale import (
    INTERNAL_SCHEMA,
    Layout,
    read_layout,
    read_version,
)
from live_migration.coordinator.run import Run
from live_migration.producer.homes import CATALOG_SCHEMA, CATALOG_TABLES
from live_migration.producer.publication import execute_politely

AUTO_PUBLICATION = "timescaledb.enable_chunk_auto_publication"
_TABLES_IN_SCHEMA = 150_000

_HAS_SETTING = "select exists (select from pg_settings where name = $1)"
_DATABASE_SETTING = """
    select split_part(s, '=', 2) from pg_db_role_setting r, unnest(r.setconfig) s
    where r.setdatabase = (select oid from pg_database where datname = current_database()) and r.setrole = 0
      and split_part(s, '=', 1) = $1
"""


async def publish_inner(run: Run, source: asyncpg.Connection) -> None:
    """Set the source up, and publish catalog and schemas of chunks; does nothing without TimescaleDB there. May be called again."""
    layout = await run.patiently("reading the hypertables", lambda: read_layout(source))
    if layout is None:
        return
    await _set_auto_publication(run, source)
    if await source.fetchval(timescale.IS_SUPERUSER):
        await _publish_catalog(run, source, layout)
    else:
        run.reporter.note(
            "the source's role is no superuser: new chunks are looked for every 15 seconds instead of being noticed at once"
        )


async def _set_auto_publication(run: Run, source: asyncpg.Connection) -> None:
    """Let TimescaleDB add new chunks to our publications itself, for all sessions that begin from now on."""
    if not await source.fetchval(_HAS_SETTING, AUTO_PUBLICATION):
        run.reporter.note(
            "this TimescaleDB publishes no new chunks by itself (2.25 on does): they are copied when found"
        )
        return
    before = await source.fetchval(_DATABASE_SETTING, AUTO_PUBLICATION)
    if before == "on":
        return
    database = await source.fetchval("select current_database()::text")
    async with run.target_transaction("recording a change on the source") as target:
        await target.execute(
            """insert into _live_migration.source_changes (kind, object, before, after)
               select 'database_setting', $1, $2, 'on'
               where not exists (select from _live_migration.source_changes
                                 where kind = 'database_setting' and object = $1 and not restored)""",
            AUTO_PUBLICATION,
            before or "",
        )
    statement = f"alter database {quote_identifier(database)} set {AUTO_PUBLICATION} = on"
    await execute_politely(
        source, [statement], lock_timeout=run.settings.lock_timeout, doing=f"setting {AUTO_PUBLICATION}"
    )


async def give_settings_back(target: asyncpg.Connection, source: asyncpg.Connection) -> list[str]:
    """Set the database's settings back that we changed; give their names."""
    with asking("target", "reading what was changed on the source"):
        rows = await target.fetch(
            """select id, object, before from _live_migration.source_changes
               where kind = 'database_setting' and not restored order by id"""
        )
    database = quote_identifier(await source.fetchval("select current_database()::text"))
    for row in rows:
        value = f"set {row['object']} = '{row['before']}'" if row["before"] else f"reset {row['object']}"
        with asking("source", f"setting {row['object']} back"):
            await source.execute(f"alter database {database} {value}")
        with asking("target", "recording what was given back"):
            await target.execute("update _live_migration.source_changes set restored = true where id = $1", row["id"])
    return [row["object"] for row in rows]


async def _publish_catalog(run: Run, source: asyncpg.Connection, layout: Layout) -> None:
    publication = quote_identifier(run.settings.insert_publication)
    present = await source.fetch(
        """select c.relname::text from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
           join pg_class c on c.oid = r.prrelid where p.pubname = $1 and c.relnamespace = $2::text::regnamespace""",
        run.settings.insert_publication,
        CATALOG_SCHEMA,
    )
    missing = [name for name in CATALOG_TABLES if name not in {row[0] for row in present}]
    exists = await source.fetch(
        "select relname::text from pg_class where relnamespace = $1::text::regnamespace", CATALOG_SCHEMA
    )
    there = {row[0] for row in exists}
    tables = ", ".join(f"only {CATALOG_SCHEMA}.{name}" for name in missing if name in there)
    statements = [f"alter publication {publication} add table {tables}"] if tables else []
    if await publishes_schemas(run, source):
        statements += await _schema_statements(source, run.settings.insert_publication, layout)
    if statements:
        await execute_politely(
            source, statements, lock_timeout=run.settings.lock_timeout, doing="publishing TimescaleDB's catalog"
        )


async def _schema_statements(source: asyncpg.Connection, publication: str, layout: Layout) -> list[str]:
    rows = await source.fetch(
        """select n.nspname::text from pg_publication_namespace r join pg_publication p on p.oid = r.pnpubid
           join pg_namespace n on n.oid = r.pnnspid where p.pubname = $1""",
        publication,
    )
    wanted = {INTERNAL_SCHEMA, *(chunk.name.schema for chunk in layout.chunks.values())}
    return [
        f"alter publication {quote_identifier(publication)} add tables in schema {quote_identifier(schema)}"
        for schema in sorted(wanted - {row[0] for row in rows})
    ]


def compressed_tables(tables: Sequence[TableInfo]) -> list[TableInfo]:
    """Give the tables of compressed rows among a source's tables."""
    return [table for table in tables if table.part == "compressed"]


async def publishes_schemas(run: Run, source: asyncpg.Connection) -> bool:
    """Tell whether the schemas of chunks are published, so that each new one is in the stream from its first row on."""
    return run.migration.source_version >= _TABLES_IN_SCHEMA and bool(await source.fetchval(timescale.IS_SUPERUSER))


async def can_watch_compressed(source: asyncpg.Connection) -> bool:
    """Tell whether tables of compressed rows can be published: before 2.29 by superusers alone."""
    version = await read_version(source)
    return version is None or await timescale.can_watch_compressed(source, version)
