"""Schemas of TimescaleDB's in a plain database: tables of the columns that its catalog and views were recorded with, version by version."""

from __future__ import annotations

import json
from pathlib import Path

import asyncpg

FOLDER = Path(__file__).parents[1] / "data" / "timescaledb"
COLUMNS: dict[str, dict[str, dict[str, str]]] = json.loads((FOLDER / "columns.json").read_text())
"""Types of columns, in their order, by version and relation. Recorded by `RECORD` on real servers."""

RECORD = """
    select n.nspname::text as schema, c.relname::text as relation, a.attname::text as column, format_type(a.atttypid, a.atttypmod) as type
    from pg_attribute a join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
    where (n.nspname like '\\_timescaledb\\_%' or n.nspname = 'timescaledb_information') and c.relkind in ('r', 'v')
      and a.attnum > 0 and not a.attisdropped
    order by n.nspname, c.relname, a.attnum
"""

_EXTENSION = """
    insert into pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
    values (1, 'timescaledb', 10, 'public'::regnamespace, false, '{}')
"""

# Functions that statements call beside the catalog's columns: of the parameters that they name.
_FUNCTIONS = """
    create schema if not exists _timescaledb_functions;
    create function public.alter_job(id int, scheduled bool default null, timezone text default null, next_start timestamptz default null,
        max_runtime interval default null, max_retries int default null, retry_period interval default null)
        returns table (job_id int) language sql as 'select 1';
    create function public.add_job(proc regproc, schedule_interval interval, config jsonb default null, initial_start timestamptz default null,
        scheduled bool default true, check_config regproc default null, fixed_schedule bool default true, timezone text default null,
        job_name text default null) returns int language sql as 'select 1';
    create function _timescaledb_functions.alter_job_set_hypertable_id(job_id int, hypertable regclass)
        returns int language sql as 'select 1';
"""


async def record(connection: asyncpg.Connection) -> dict[str, dict[str, str]]:
    """Give what `COLUMNS` holds of a version, from a database that has it."""
    found: dict[str, dict[str, str]] = {}
    for row in await connection.fetch(RECORD):
        found.setdefault(f"{row['schema']}.{row['relation']}", {})[row["column"]] = row["type"]
    return found


async def make_catalog(connection: asyncpg.Connection, version: str) -> None:
    """Have a plain database look as one with this version does to whoever reads its catalog; all tables are empty.

    A type that a plain server lacks becomes text.
    """
    await connection.execute(_FUNCTIONS + _EXTENSION.format(version))
    for relation, columns in COLUMNS[version].items():
        known = [f'"{name}" {await _known_type(connection, type)}' for name, type in columns.items()]
        schema = relation.split(".")[0]
        await connection.execute(f"create schema if not exists {schema}; create table {relation} ({', '.join(known)})")


async def _known_type(connection: asyncpg.Connection, type: str) -> str:
    return type if await connection.fetchval("select to_regtype($1) is not null", type) else "text"
