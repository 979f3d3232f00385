"""What text is ordered by in a database: whether two databases order it alike."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import asyncpg

from live_migration.common.relation import QualifiedName

_FIRST_WITH_VERSION_OF_DATABASES = 15

# As JSON: the columns came one by one, and one was renamed, with 15, 16 and 17.
_DATABASE = "select (to_jsonb(d) - 'datacl')::text from pg_database d where datname = current_database()"
_ENCODING = "select getdatabaseencoding()"
_VERSION = (
    "select pg_database_collation_actual_version(oid) from pg_database where datname = current_database()",
    """select pg_collation_actual_version(c.oid) from pg_collation c join pg_database d
           on lower(replace(d.datcollate, '-', '')) = lower(replace(c.collcollate, '-', ''))  -- en_US.UTF-8 is en_US.utf8
       where d.datname = current_database() and c.collprovider = 'c' order by c.oid limit 1""",
)
_COLLATIONS = """
    select n.nspname::text as schema, c.collname::text as name, to_jsonb(c)::text as collation,
           case when c.collprovider <> 'd' then pg_collation_actual_version(c.oid) end as version
    from unnest($1::text[], $2::text[]) w (schema, name) join pg_namespace n on n.nspname = w.schema
    join pg_collation c on c.collnamespace = n.oid and c.collname = w.name
    where c.collencoding in (-1, (select encoding from pg_database where datname = current_database()))
"""
_BYTES = frozenset({"", "C", "POSIX"})
_AS_CODE_POINTS = frozenset({"UTF8", "LATIN1"})
"""Encodings whose bytes are in the order of Unicode's code points."""


@dataclass(frozen=True, slots=True)
class TextOrder:
    """By which text is ordered. `version`: of the library's data, as far as it has one; of bytes `locale` is the encoding."""

    provider: str
    locale: str
    rules: str = ""
    version: str = ""


def plain_locale(locale: str) -> str:
    """Give a locale's name without what systems write differently: en_US.UTF-8 is en_US.utf8."""
    name, dot, encoding = locale.partition(".")
    return name + dot + encoding.lower().replace("-", "")


def order_of(row: Mapping[str, str | None], version: str | None, encoding: str) -> TextOrder:
    """Give the order of a database's or a collation's row in the catalog, of whatever version. Pure."""
    provider = row.get("datlocprovider") or row.get("collprovider") or "c"
    own = [row.get(name) for name in ("datlocale", "daticulocale", "colllocale", "colliculocale")]
    libc = row.get("datcollate") or row.get("collcollate") or ""
    # Before 15 an ICU collation's locale stood where one of the C library's does.
    locale = libc if provider == "c" else next((each for each in own if each), libc)
    if provider == "b" or (provider == "c" and locale in _BYTES):
        return TextOrder("bytes", "code points" if encoding in _AS_CODE_POINTS else encoding)
    rules = row.get("daticurules") or row.get("collicurules") or ""
    return TextOrder(provider, plain_locale(locale), rules, version or "")


async def read_collation_version(connection: asyncpg.Connection) -> str | None:
    """Give the version that the library has by now which orders text in this database; None where it has none."""
    query = _VERSION[connection.get_server_version().major < _FIRST_WITH_VERSION_OF_DATABASES]
    version: str | None = await connection.fetchval(query)
    return version


async def read_orders(
    connection: asyncpg.Connection, collations: Collection[QualifiedName]
) -> dict[QualifiedName | None, TextOrder]:
    """Give the order of the database, by None, and of those of the collations that are there."""
    encoding = await connection.fetchval(_ENCODING)
    database = json.loads(await connection.fetchval(_DATABASE))
    rows = await connection.fetch(_COLLATIONS, [each.schema for each in collations], [each.name for each in collations])
    found: dict[QualifiedName | None, TextOrder] = {
        QualifiedName(row["schema"], row["name"]): order_of(json.loads(row["collation"]), row["version"], encoding)
        for row in rows
    }
    return {None: order_of(database, await read_collation_version(connection), encoding), **found}
