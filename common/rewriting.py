"""DDL that writes a table's rows anew with new values, of which the stream tells nothing: by what it is known."""

from __future__ import annotations

FILE_MARK = """concat_ws(' ', c.relfilenode, (
    select string_agg(a.attnum || ':' || a.xmin, ' ' order by a.attnum) from pg_attribute a
    where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped))"""
"""A relation's file and what wrote each of its columns' definitions: an expression, of pg_class as `c`."""


def is_rewritten(before: str | None, now: str | None) -> bool:
    """Tell by a relation's marks whether its rows may have got new values in between; False where one of them is not known.

    VACUUM FULL, CLUSTER, TRUNCATE and a move to another tablespace make a new file alone, a default or a comment a new definition alone.
    ALTER TYPE and ADD COLUMN with a volatile default make both.
    """
    if not before or not now:
        return False
    (file, *columns), (file_now, *columns_now) = before.split(), now.split()
    return file != file_now and not set(columns_now) <= set(columns)
