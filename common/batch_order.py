"""What compressed batches hold of the order of text: the least and the greatest value, the first and the last.

Queries, DELETE and the check of a key pass over a batch by them, so they hold under one order alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import asyncpg

from live_migration.common.collations import TextOrder, read_orders
from live_migration.common.hashing import TEXT_TYPES, read_hashed
from live_migration.common.relation import QualifiedName

_OWN = "_ts_meta_"
# A compressed table has none of its own but these and the count, the number and the filter of a batch.
_BOUNDS = f"""
    select a.attrelid as relation, a.attname::text as name, n.nspname::text as schema, c.collname::text as collation,
           c.collprovider = 'd' as is_default
    from pg_attribute a left join pg_collation c on c.oid = a.attcollation left join pg_namespace n on n.oid = c.collnamespace
    where a.attrelid = any($1::oid[]) and a.attnum > 0 and not a.attisdropped and starts_with(a.attname::text, '{_OWN}')
"""


async def read_text_bounds(
    source: asyncpg.Connection, compressed: Collection[int]
) -> dict[int, set[QualifiedName | None]]:
    """Give the collations by which bounds of batches hold, None for the database's, of each table of compressed rows that has such bounds."""
    found: dict[int, set[QualifiedName | None]] = {}
    hashed = await read_hashed(source, compressed, _OWN)
    for row in await source.fetch(_BOUNDS, list(compressed)):
        if row["collation"] is not None:
            own = None if row["is_default"] else QualifiedName(row["schema"], row["collation"])
            found.setdefault(row["relation"], set()).add(own)
        elif (each := hashed.get((row["relation"], row["name"]))) and each.types & TEXT_TYPES:
            found.setdefault(row["relation"], set()).add(None)  # jsonb, ranges and rows order text by the database's
    return found


def other_orders(
    wanted: Collection[QualifiedName | None],
    ours: Mapping[QualifiedName | None, TextOrder],
    theirs: Mapping[QualifiedName | None, TextOrder],
) -> set[QualifiedName | None]:
    """Give the collations that both ends have, and that order text otherwise on one than on the other. Pure."""
    return {each for each in wanted if each in ours and each in theirs and ours[each] != theirs[each]}


async def find_other_orders(
    source: asyncpg.Connection, target: asyncpg.Connection, wanted: Collection[QualifiedName | None]
) -> set[QualifiedName | None]:
    """Do the same of two databases."""
    named = [each for each in wanted if each is not None]
    return other_orders(wanted, await read_orders(source, named), await read_orders(target, named))
