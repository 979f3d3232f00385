"""TimescaleDB's own catalog from source to target, whole, where both ends have the same version of the extension.

What pg_dump would dump of the extension's configuration tables is read in the snapshot that the plan and the schema's dump are of
(another moment's rows name tables that the dump lacks, and crash the target's server), kept in the state, and written into the
target in restoring mode, after the tables that its rows name. Values travel as text, for some are relations and roles, which have other oids there.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass

import asyncpg

from live_migration.common.errors import TargetError
from live_migration.common.postgres import asking, enter_replica_role
from live_migration.common.relation import QualifiedName, quote_identifier
from live_migration.common.timescale import read_version
from live_migration.coordinator import archives, steps
from live_migration.coordinator.job_owners import give_policies
from live_migration.coordinator.run import Run
from live_migration.coordinator.source_jobs import hold_target_jobs

ARCHIVE = "timescaledb catalog"
EXTENSION_STEP = "timescaledb extension"
_RESTORED = "timescaledb catalog"
PRE_RESTORE = "timescaledb pre restore"
"""Begun before restoring mode, which every session that begins in it keeps; `POST_RESTORE` is done after it."""
POST_RESTORE = "timescaledb post restore"

_CONFIGURATION = """
    select c.relkind::text as kind, n.nspname::text as schema, c.relname::text as name, coalesce(k.condition, '') as condition,
           array(select a.attname::text from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' order by a.attnum) as columns,
           array(select a.attname::text from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and a.atttypid = 'regclass'::regtype) as relations
    from pg_extension e, unnest(e.extconfig, e.extcondition) with ordinality k (oid, condition, number)
    join pg_class c on c.oid = k.oid join pg_namespace n on n.oid = c.relnamespace
    where e.extname = 'timescaledb' and c.relname <> 'continuous_aggs_jobs_refresh_ranges'
    order by k.number
"""
"""But for what running refreshes hold: the target may have a process of the same number, for which refreshes would be refused there."""


@dataclass(frozen=True, slots=True)
class CatalogTable:
    """Rows of one configuration table: `content` is base64 of COPY's text format. `condition`: which rows are dumped."""

    schema: str
    name: str
    condition: str
    columns: list[str]
    content: str


@dataclass(frozen=True, slots=True)
class Catalog:
    """What a source's extension holds, and the schema that the extension is in. `sequences`: name in SQL, last value, is called."""

    version: str
    schema: str
    tables: list[CatalogTable]
    sequences: list[tuple[str, int, bool]]

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, content: bytes) -> Catalog:
        found = json.loads(content)
        tables = [CatalogTable(**table) for table in found["tables"]]
        return cls(found["version"], found["schema"], tables, [(n, v, c) for n, v, c in found["sequences"]])


async def read_catalog(source: asyncpg.Connection) -> Catalog | None:
    """Read the extension's configuration; None where there is no TimescaleDB. Call it in the planning snapshot."""
    version = await read_version(source)
    if version is None:
        return None
    schema = await source.fetchval(
        "select extnamespace::regnamespace::text from pg_extension where extname = 'timescaledb'"
    )
    tables, sequences = [], []
    for row in await source.fetch(_CONFIGURATION):
        name = QualifiedName(row["schema"], row["name"])
        if row["kind"] == "S":
            value = await source.fetchrow(f"select last_value, is_called from {name.sql}")
            sequences.append((name.sql, value["last_value"], value["is_called"]))
        else:
            content = await _read_rows(source, name, row["columns"], row["relations"], row["condition"])
            tables.append(CatalogTable(name.schema, name.name, row["condition"], row["columns"], content))
    return Catalog(version, schema, tables, sequences)


async def _read_rows(
    source: asyncpg.Connection, name: QualifiedName, columns: list[str], relations: list[str], condition: str
) -> str:
    content = bytearray()

    async def take(data: bytes) -> None:
        content.extend(data)

    listed = ", ".join(_named(column) if column in relations else f"t.{quote_identifier(column)}" for column in columns)
    await source.copy_from_query(f"select {listed} from {name.sql} t {condition}", output=take, format="text")
    return base64.b64encode(content).decode()


def _named(column: str) -> str:
    """Give a relation's name as the snapshot has it: regclass itself prints a number for one that was dropped since."""
    return (
        "(select pg_catalog.format('%I.%I', n.nspname, c.relname) from pg_catalog.pg_class c"
        f" join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = t.{quote_identifier(column)})"
    )


async def load_catalog(run: Run) -> Catalog | None:
    """Give what the state keeps of the source's catalog."""
    with asking("target", "reading the plan"):
        content = await archives.read(run.target, ARCHIVE)
    return Catalog.decode(content) if content else None


async def begin_restoring(run: Run) -> None:
    """Make the extension on the target, in the source's version, and enter restoring mode."""
    catalog = await load_catalog(run)
    if catalog is None or await steps.is_done(run.target, POST_RESTORE):
        return
    # In a session of its own: the extension must be made before anything of it is loaded.
    async with run.target_session("timescaledb") as target:
        present = await read_version(target)
        if present is None:
            with asking("target", f"making extension timescaledb {catalog.version}"):
                await target.execute(f"create schema if not exists {catalog.schema}")
                await target.execute(
                    f"create extension timescaledb with schema {catalog.schema} version '{catalog.version}'"
                )
        elif present != catalog.version:
            raise TargetError(
                f"the target has TimescaleDB {present}, the source {catalog.version}",
                hint=f"Run `alter extension timescaledb update to '{catalog.version}'` on the older side.",
            )
    async with run.target_session("timescaledb") as target:
        with asking("target", "entering TimescaleDB's restoring mode"):
            await steps.begin(target, PRE_RESTORE)
            await target.execute(f"select {catalog.schema}.timescaledb_pre_restore()")
    with asking("target", "entering TimescaleDB's restoring mode"):
        await run.target.execute("set timescaledb.restoring = on")


async def restore_catalog(run: Run) -> None:
    """Write the catalog's rows, once the tables that they name are there. Jobs are off until the cutover."""
    catalog = await load_catalog(run)
    if catalog is None or await steps.is_done(run.target, _RESTORED):
        return
    async with run.target_transaction("restoring TimescaleDB's catalog") as target:
        await enter_replica_role(target)
        for table in catalog.tables:
            await _write_rows(target, table)
        for name, value, is_called in catalog.sequences:
            await target.execute("select setval($1::text::regclass, $2, $3)", name, value, is_called)
        await steps.finish(target, run.epoch, _RESTORED)


async def _write_rows(target: asyncpg.Connection, table: CatalogTable) -> None:
    name = QualifiedName(table.schema, table.name)
    await target.execute(f"delete from {name.sql} {table.condition}")
    content = base64.b64decode(table.content)
    if not content:
        return
    if table.name == "bgw_job":
        role = await target.fetchval("select current_user::regrole::text")
        content = give_policies(content, table.columns, role)

    async def rows() -> object:
        yield content

    await target.copy_to_table(name.name, schema_name=name.schema, columns=table.columns, source=rows(), format="text")


async def end_restoring(run: Run) -> None:
    """Leave restoring mode: from now on a hypertable's root routes rows. Every chunk is copied and indexed by now."""
    catalog = await load_catalog(run)
    if catalog is None or await steps.is_done(run.target, POST_RESTORE):
        return
    async with run.target_session("timescaledb") as target:
        with asking("target", "leaving TimescaleDB's restoring mode"):
            async with target.transaction():
                await hold_target_jobs(target)  # before the scheduler comes back, in the same transaction
                await target.execute(f"select {catalog.schema}.timescaledb_post_restore()")
    with asking("target", "leaving TimescaleDB's restoring mode"):
        await run.target.execute("set timescaledb.restoring = off")
    async with run.target_transaction("leaving TimescaleDB's restoring mode") as target:
        await steps.finish(target, run.epoch, POST_RESTORE)
