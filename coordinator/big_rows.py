"""Rows that PostgreSQL cannot send, for `validate`: looked for as far as a short look proves them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import asyncpg

from live_migration.common.catalog import USERS_OWN
from live_migration.common.progress import format_bytes
from live_migration.common.relation import QualifiedName, quote_identifier
from live_migration.coordinator.findings import Finding, warning

MESSAGE_BYTES = (1 << 30) - 1
"""The longest message that PostgreSQL can build (`MaxAllocSize`); a row is one."""
_LONGEST_SCAN_BYTES = 1 << 30
_BEST_COMPRESSION = 256
"""No TOASTed value is more times as long as what it takes on disk (lz4; pglz stays below)."""
_LOOK_SECONDS = 2
_MOST_TABLES = 10
_BYTEA = 17
_MEASURED = [_BYTEA, 25, 1043]
"""bytea, text, varchar: types whose `octet_length` the server tells without reading the value."""

_CANDIDATES = f"""
    select n.nspname::text as schema, c.relname::text as name, columns.names, columns.types
    from pg_class c join pg_namespace n on n.oid = c.relnamespace,
         lateral (select array_agg(a.attname::text order by a.attnum) as names, array_agg(a.atttypid order by a.attnum) as types
                  from pg_attribute a
                  where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
                    and a.atttypid = any($1::oid[])) columns
    where c.relkind = 'r' and c.relpersistence in ('p', 'u') and c.reltoastrelid <> 0 and {USERS_OWN}
      and columns.names is not null and has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select')
      and pg_relation_size(c.reltoastrelid) >= $2 and pg_relation_size(c.oid) <= $3
    order by pg_relation_size(c.reltoastrelid) desc limit $4
"""


@dataclass(frozen=True, slots=True)
class BigRow:
    """A row that no message can hold; `place`: its ctid; `size`: the length of its values as they would travel."""

    table: str
    place: str
    size: int


async def find_big_rows(source: asyncpg.Connection, *, is_binary: bool) -> list[BigRow]:
    """Give one such row of each table in which a look of two seconds proves one.

    Only the tables themselves are read, up to 1 GiB each, never their TOASTed values, whose lengths stand in the rows. At most ten
    tables are looked at, those with the most TOASTed data first; what cannot be told in that way is passed over.
    """
    least_toast = MESSAGE_BYTES // 2 // _BEST_COMPRESSION
    tables = await _within_seconds(source, _CANDIDATES, _MEASURED, least_toast, _LONGEST_SCAN_BYTES, _MOST_TABLES)
    found = []
    for table in tables:
        name = QualifiedName(table["schema"], table["name"])
        length = " + ".join(_length(*column, is_binary) for column in zip(table["names"], table["types"], strict=True))
        query = f"select ctid::text as place, {length} as size from only {name.sql} where {length} > $1 limit 1"
        found += [
            BigRow(str(name), row["place"], row["size"]) for row in await _within_seconds(source, query, MESSAGE_BYTES)
        ]
    return found


async def _within_seconds(source: asyncpg.Connection, query: str, *arguments: object) -> list[asyncpg.Record]:
    """Give a query's rows, none where it takes too long or its table is gone."""
    with suppress(asyncpg.QueryCanceledError, asyncpg.UndefinedTableError):
        async with source.transaction(readonly=True):
            await source.execute(
                f"set local statement_timeout = {round(_LOOK_SECONDS * 1000)}; set local max_parallel_workers_per_gather = 0"
            )
            rows: list[asyncpg.Record] = await source.fetch(query, *arguments)
            return rows
    return []


def assess_big_rows(rows: Sequence[BigRow], *, is_binary: bool) -> list[Finding]:
    """Name what would end a copy, or the stream for good."""
    form = "binary" if is_binary else "text, which is twice as long for bytea"
    return [
        warning(
            f"{row.table} holds a row of {format_bytes(row.size)} (ctid {row.place}) in the form that changes travel in ({form}): PostgreSQL sends "
            "none above 1 GB; a change that holds it ends the stream for good, and so may the table's copy end",
            "Cut the value into several rows, or keep it as a large object, which is copied at the cutover; look for others beside it.",
        )
        for row in rows
    ]


def _length(name: str, type_oid: int, is_binary: bool) -> str:
    factor = 2 if type_oid == _BYTEA and not is_binary else 1
    return f"coalesce(octet_length({quote_identifier(name)}), 0)::bigint * {factor}"
