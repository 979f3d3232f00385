"""Which columns have values that hash to the same on every server: not those whose hash takes in an oid, which each server gives by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import asyncpg

TEXT_TYPES = frozenset({"text", "varchar", "bpchar", "name", "char", "jsonb"})
"""Built-in types that are hashed by their bytes in the database's encoding."""
_BY_VALUE = TEXT_TYPES | {
    *("bool", "bytea", "int2", "int4", "int8", "oid", "float4", "float8", "numeric", "money", "uuid", "pg_lsn", "xid", "xid8"),
    *("date", "time", "timetz", "timestamp", "timestamptz", "interval", "inet", "cidr", "macaddr", "macaddr8"),
}  # fmt: skip

# An array's hash is made of its elements', a range's of its bounds', a row's of its columns', and a domain has that of its base.
# As JSON: multiranges came with 14.
_PARTS = """
    with recursive part as (
        select a.attrelid as relation, a.attname::text as name, a.atttypid as type
        from pg_attribute a
        where a.attrelid = any($1::oid[]) and a.attnum > 0 and not a.attisdropped and starts_with(a.attname::text, $2)
        union
        select p.relation, p.name, o.type
        from part p join pg_type t on t.oid = p.type cross join lateral (
            select t.typbasetype as type where t.typtype = 'd'
            union all select t.typelem where t.typelem <> 0 and t.typlen = -1
            union all select r.rngsubtype from pg_range r
                      where t.typtype in ('r', 'm') and t.oid in (r.rngtypid, (to_jsonb(r) ->> 'rngmultitypid')::oid)
            union all select f.atttypid from pg_attribute f where t.typtype = 'c' and f.attrelid = t.typrelid and f.attnum > 0 and not f.attisdropped
        ) o
    )
    select p.relation, p.name, t.typname::text as type, n.nspname = 'pg_catalog' as is_built_in,
           t.typtype in ('e', 'p') as has_oids, n.nspname = 'pg_catalog' and t.typname ~ '^reg' as is_reference
    from part p join pg_type t on t.oid = p.type join pg_namespace n on n.oid = t.typnamespace
    where t.typtype in ('b', 'e', 'p') and not (t.typelem <> 0 and t.typlen = -1)
"""
_ENCODING = "select getdatabaseencoding()"


@dataclass(frozen=True, slots=True)
class Hashed:
    """What the hash of a column's values is made of: the built-in types in it, whether others are, and whether oids go in.

    `has_references`: values are oids of the catalog's rows, as of regclass.
    """

    types: frozenset[str]
    has_others: bool
    has_oids: bool
    has_references: bool = False

    def is_by_value(self, *, same_encoding: bool) -> bool:
        """Tell whether a value hashes to the same on both servers for certain."""
        differs = not same_encoding and self.types & TEXT_TYPES
        return not (self.has_others or self.has_oids or differs or not self.types)


async def read_hashed(
    connection: asyncpg.Connection, relations: Iterable[int], prefix: str = ""
) -> dict[tuple[int, str], Hashed]:
    """Give what the hash of each column of some relations is made of, by the relation's oid and the column's name, which begins with `prefix`."""
    found: dict[tuple[int, str], Hashed] = {}
    for row in await connection.fetch(_PARTS, list(relations), prefix):
        key = row["relation"], row["name"]
        known = found.get(key, Hashed(frozenset(), has_others=False, has_oids=False))
        is_by_value = row["is_built_in"] and row["type"] in _BY_VALUE
        found[key] = Hashed(
            known.types | {row["type"]} if is_by_value else known.types,
            known.has_others or not (is_by_value or row["has_oids"] or row["is_reference"]),
            known.has_oids or row["has_oids"] or row["is_reference"],
            known.has_references or row["is_reference"],
        )
    return found


async def read_encoding(connection: asyncpg.Connection) -> str:
    """Give the encoding that a database keeps text in."""
    encoding: str = await connection.fetchval(_ENCODING)
    return encoding
