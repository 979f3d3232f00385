"""How the source has an index or constraint now: what was planned may name columns that have other names since, or are gone."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

_NOW = """
    with wanted as (
        select i.indexrelid as oid, i.indrelid, i.indisunique, i.indisclustered, i.indisreplident, con.oid as constraint_oid, c.relname, c.reloptions,
               format('%I.%I', t.schema, t.name) as "table", format('%I.%I', t.schema, $2::text) as index
        from pg_index i join pg_class c on c.oid = i.indexrelid
        join (select t.oid, n.nspname as schema, t.relname as name from pg_class t join pg_namespace n on n.oid = t.relnamespace) t on t.oid = i.indrelid
        left join pg_constraint con on con.conindid = i.indexrelid and con.conrelid = i.indrelid and con.contype in ('p', 'u', 'x')
        where i.indisvalid and ($1::oid in (i.indexrelid, con.oid) or (c.relname = $2 and t.schema = $3))
        order by ($1::oid in (i.indexrelid, con.oid)) desc nulls last limit 1
    )
    select case when constraint_oid is null
                then concat('CREATE ', case when indisunique then 'UNIQUE ' end, 'INDEX ', quote_ident($2), substr(
                         pg_get_indexdef(oid), 1 + length(concat('CREATE ', case when indisunique then 'UNIQUE ' end, 'INDEX ', quote_ident(relname)))))
                else format('ALTER TABLE %s%s ADD CONSTRAINT %I %s', case when $4 then 'ONLY ' end, "table", $2, pg_get_constraintdef(constraint_oid)) end,
           case when constraint_oid is not null and reloptions is not null
                then format('ALTER INDEX %s SET (%s)', index, array_to_string(reloptions, ', ')) end,
           (select string_agg(format('ALTER INDEX %s ALTER COLUMN %s SET STATISTICS %s', index, attnum, attstattarget), '; ' order by attnum)
            from pg_attribute where attrelid = oid and attstattarget >= 0),
           case when indisclustered then format('ALTER TABLE %s CLUSTER ON %I', "table", $2) end,
           case when indisreplident then format('ALTER TABLE ONLY %s REPLICA IDENTITY USING INDEX %I', "table", $2) end
    from wanted
"""
"""What pg_dump writes of an index, by the oid of it or its constraint; ALTER TYPE makes it anew, and it is the one of that name then."""


async def read_now(
    source: asyncpg.Connection, oid: int, schema: str, name: str, planned: Sequence[str]
) -> tuple[str, ...] | None:
    """Give the statements that make an index, under the name that was `planned`, as the source has it now; None where it is gone.

    Args:
        oid: of the index or its constraint on the source.
        schema: of its table, when it was planned.

    Names come in full where the session has an empty search_path, as ours have.
    """
    is_only = any("TABLE ONLY" in statement.upper() for statement in planned)
    row = await source.fetchrow(_NOW, oid, name, schema, is_only)
    if row is None or row[0] is None:  # null: dropped since the snapshot
        return None
    return tuple(statement for statement in row if statement)


def is_as_planned(now: Sequence[str], planned: Sequence[str]) -> bool:
    """Tell whether the statements that were planned make just the index that there is now: to make it by the others is in vain."""
    return _plain(now[0]) in _plain(" ".join(planned))


def _plain(statement: str) -> str:
    return " ".join(statement.split()).lower()
