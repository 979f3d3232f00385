"""The copy phase alone: the state a coordinator would have made, consumers as tasks or as processes, and comparison."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg

from live_migration.common import state
from live_migration.common.catalog import list_tables
from live_migration.common.postgres import session
from live_migration.common.settings import Settings, load_settings
from live_migration.consumer.copy_phase import run_copy_phase
from live_migration.producer.slot import identify_system

PROGRAM = """
import asyncio, sys
from live_migration.common.settings import load_settings
from live_migration.common.telemetry import configure_logging
from live_migration.consumer.copy_phase import run_copy_phase
configure_logging("info")
asyncio.run(run_copy_phase(load_settings({}), sys.argv[1], asyncio.Event()))
"""

_INDEXES = """
    select i.indexrelid as oid, i.indrelid as table_oid, c.relname as name, i.indisprimary as is_primary,
           i.indisunique as is_unique, pg_relation_size(i.indexrelid) as size_bytes,
           case when k.oid is null then pg_get_indexdef(i.indexrelid)
                else format('alter table %s add constraint %I %s', i.indrelid::regclass, k.conname, pg_get_constraintdef(k.oid))
           end as statement
    from pg_index i join pg_class c on c.oid = i.indexrelid left join pg_constraint k on k.conindid = i.indexrelid
    where i.indrelid = any($1::oid[])
"""


async def run_sql(uri: str, script: str) -> None:
    async with session(uri, "source") as connection:
        await connection.execute(script)


async def plan(source: str, target: str) -> None:
    """Write the state that the copy phase begins with: all tables of the source and their indexes."""
    identity = await identify_system(source)
    async with session(source, "source") as there, session(target, "target") as here, here.transaction():
        await state.create_schema(here)
        await here.execute(
            """insert into _live_migration.migration (id, name, phase, settings, kafka, source_address, source_system,
                   source_timeline, source_database, source_version, topic_id, lane_count)
               values ($1, 'test', 'copy', '{}', '', 'here', $2, $3, $4, 180000, $1, 8)""",
            uuid4(),
            identity.system_identifier,
            identity.timeline,
            identity.database,
        )
        tables = await list_tables(there)
        for table in tables:
            columns = [{"name": c.name, "type": c.type, "generated": c.generated} for c in table.columns]
            await here.execute(
                """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy,
                       row_estimate, size_bytes) values ($1, $2, $3, 0, 'all', $4, $5, $6, $7)""",
                table.oid,
                table.name.schema,
                table.name.name,
                json.dumps(columns),
                table.is_binary_safe,
                table.row_estimate,
                table.size_bytes,
            )
        for row in await there.fetch(_INDEXES, [table.oid for table in tables]):
            await here.execute(
                """insert into _live_migration.indexes (oid, table_oid, name, statements, is_primary, is_unique, size_bytes)
                   values ($1, $2, $3, array[$4], $5, $6, $7)""",
                *(row[k] for k in ("oid", "table_oid", "name", "statement", "is_primary", "is_unique", "size_bytes")),
            )


def settings_for(source: str, target: str, **options: Any) -> Settings:
    return load_settings({"source": source, "target": target, "lease": 3.0, "lock_timeout": 0.5, **options})


@asynccontextmanager
async def consumers(settings: Settings, count: int = 1) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run consumers as tasks; at the end they are told to stop, and must do so without an error."""
    stop = asyncio.Event()
    tasks = [asyncio.ensure_future(run_copy_phase(settings, f"consumer-{i}", stop)) for i in range(count)]
    try:
        yield tasks
        stop.set()
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):  # the test fails for what the consumer did not do: here is why
                print("a consumer failed:", *traceback.format_exception(outcome))


@asynccontextmanager
async def consumer_process(settings: Settings, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a consumer as a process of its own, killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, name, env={**os.environ, **settings.environment()}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until(target: str, query: str, *arguments: object, timeout: float = 60) -> Any:
    """Wait until `query` gives something true on the target."""
    async with session(target, "target") as connection:
        try:
            async with asyncio.timeout(timeout):
                while not (value := await connection.fetchval(query, *arguments)):
                    await asyncio.sleep(0.03)
                return value
        except TimeoutError:
            rows = await connection.fetch("select * from _live_migration.tables where state <> 'ready'")
            events = await connection.fetch("select message from _live_migration.events")
            raise AssertionError(f"not within {timeout} s: {query}\n{rows}\n{events}") from None


async def until_ready(target: str, *, timeout: float = 60) -> None:
    await until(target, "select bool_and(state = 'ready') from _live_migration.tables", timeout=timeout)


async def contents(uri: str) -> dict[str, tuple[list[str], list[str]]]:
    """Give each table's column names and its own rows in text form, sorted."""
    async with session(uri, "source") as connection:
        found = {}
        for table in await list_tables(connection):
            rows = await connection.fetch(f'select t::text collate "C" from only {table.name.sql} t order by 1')
            found[str(table.name)] = ([column.name for column in table.columns], [row[0] for row in rows])
        return found


async def index_definitions(uri: str) -> list[str]:
    async with session(uri, "source") as connection:
        rows = await connection.fetch(
            "select indexdef from pg_indexes where schemaname !~ '^pg_|^_live|^information' order by 1"
        )
        return [row[0] for row in rows]


async def fetch_value(uri: str, query: str, *arguments: object) -> Any:
    connection = await asyncpg.connect(uri)
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()
