"""What must hold when a migration is over: every row, every sequence, every index and constraint; and no trace after `clean`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import asyncpg

from tests.support.workload import TABLES, differences, read_rows

_CATALOG = """
    select 'index ' || i.indexrelid::regclass || ': ' || pg_get_indexdef(i.indexrelid) || ' ' || i.indisvalid
        from pg_index i join pg_class c on c.oid = i.indexrelid where c.relnamespace = 'app'::regnamespace
    union all select 'constraint ' || conrelid::regclass || '.' || conname || ': ' || pg_get_constraintdef(oid) || ' ' || convalidated
        from pg_constraint where connamespace = 'app'::regnamespace and contype <> 'n'
    union all select 'trigger ' || tgrelid::regclass || '.' || tgname || ' ' || tgenabled::text
        from pg_trigger t join pg_class c on c.oid = tgrelid where c.relnamespace = 'app'::regnamespace and not tgisinternal
    union all select 'relation ' || oid::regclass || ' ' || relkind::text
        from pg_class where relnamespace = 'app'::regnamespace
"""
_SEQUENCES = (
    "select schemaname || '.' || sequencename, coalesce(last_value, 0) from pg_sequences where schemaname = 'app'"
)
_CRASH_GAP = 33
"""A crash moves a sequence on by what it had logged ahead."""

_TRACES = """
    select 'slot ' || slot_name from pg_replication_slots where slot_name like $1 || '%'
    union all select 'publication ' || pubname from pg_publication
    union all select 'schema ' || nspname from pg_namespace where nspname like '%live_migration%'
    union all select 'relation ' || relname from pg_class where relname like '%live_migration%'
    union all select 'function ' || proname from pg_proc where proname like '%live_migration%'
    union all select 'session ' || application_name from pg_stat_activity
              where application_name like 'live-migration%' and datname = current_database()
"""

_ALARM = re.compile(r"SlotLost|LogGap|recopy|are lost")


def alarms(exits: Iterable[str]) -> list[str]:
    """Give the ends of processes that call changes lost: no fault of a round takes slot, publications or topics away, so it is wrong or true."""
    return [line for line in exits if _ALARM.search(line)]


async def compare(
    source: str, target: str, *, source_crashed_late: bool, tables: tuple[str, ...] = TABLES
) -> list[str]:
    """Give one line for each difference between two databases.

    Args:
        source_crashed_late: the source was restarted after its sequences may have been read, which moves them on.
        tables: whose rows are compared; of the others their definition is.
    """
    here, there = await _read(source), await _read(target)
    if lacking := [table for table in tables if f"relation {table} r" in here[0] - there[0]]:
        return [f"{table}: not on the target" for table in lacking]
    rows = differences(await read_rows(source, tables), await read_rows(target, tables))
    found = [f"{table}: {what}" for table, what in rows.items()]
    found += [f"only on the source: {line}" for line in here[0] - there[0]]
    found += [f"only on the target: {line}" for line in there[0] - here[0]]
    for name, value in here[1].items():
        least = value - _CRASH_GAP if source_crashed_late else value
        if not least <= there[1].get(name, -1) <= value:
            found.append(f"sequence {name}: {value} on the source, {there[1].get(name)} on the target")
    return found


async def compare_digests(source: str, target: str, tables: tuple[str, ...]) -> list[str]:
    """As `compare` for rows alone, added up on the servers: for tables too large to be held here."""
    here, there = await _digests(source, tables), await _digests(target, tables)
    return [
        f"{table}: {here[table]} on the source, {there[table]} on the target"
        for table in tables
        if here[table] != there[table]
    ]


async def _digests(uri: str, tables: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    settings = {"timezone": "UTC", "extra_float_digits": "3"}
    connection = await asyncpg.connect(uri, server_settings=settings)
    try:
        query = "select count(*), coalesce(sum(hashtextextended(t::text, 0)), 0)::text from {} t"
        rows = {table: await connection.fetchrow(query.format(table)) for table in tables}
        return {table: (row[0], int(row[1])) for table, row in rows.items()}
    finally:
        await connection.close()


async def _read(uri: str) -> tuple[set[str], dict[str, int]]:
    connection = await asyncpg.connect(uri)
    try:
        catalog = {row[0] for row in await connection.fetch(_CATALOG)}
        sequences: dict[str, Any] = dict(await connection.fetch(_SEQUENCES))
        return catalog, sequences
    finally:
        await connection.close()


async def traces(uri: str, name: str) -> list[str]:
    """Give what a migration left in a database after `clean`."""
    connection = await asyncpg.connect(uri)
    try:
        return [row[0] for row in await connection.fetch(_TRACES, name)]
    finally:
        await connection.close()
