"""DDL that gives a table's rows new values, of which the stream tells nothing: by what it is known."""

from __future__ import annotations

from typing import NamedTuple

from live_migration.common.relation import FIXED_OIDS, TIMESTAMPS

FILE_MARK = """concat_ws(' ', c.relfilenode, (
    select string_agg(concat_ws(':', a.attnum, a.xmin, a.atttypid, encode(convert_to(a.attname::text, 'UTF8'), 'hex')), ' ' order by a.attnum)
    from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped))"""
"""A relation's file, then each column's number, what wrote its definition, type and name: an expression, of pg_class as `c`."""

ANEW = "was written anew on the source by DDL that may have given its rows new values (ALTER TYPE … USING, ADD COLUMN with a volatile default)"


class _Column(NamedTuple):
    """A column in a mark. One of the first form has neither type nor name."""

    number: int
    written_by: str
    type_oid: int = 0
    name: str = ""


def find_rewrite(before: str | None, now: str | None) -> str:
    """Say by a relation's marks what may have given its rows new values in between; '' where nothing has, or one of them is not known.

    VACUUM FULL, CLUSTER, TRUNCATE and a move to another tablespace make a new file alone, a default or a comment a new definition alone.
    ALTER TYPE and ADD COLUMN with a volatile default make both. A name that has come to mean another column makes no file: the
    target knows columns by their names alone. Nor do some types that take the place of others, see `_is_doubtful`.
    """
    if not before or not now:
        return ""
    (file, columns), (file_now, columns_now) = _parse(before), _parse(now)
    defined = {(column.number, column.written_by) for column in columns}
    if file != file_now and any((column.number, column.written_by) not in defined for column in columns_now):
        return ANEW
    numbers = {column.name: column.number for column in reversed(columns) if column.name}
    moved = [column.name for column in columns_now if numbers.get(column.name, column.number) != column.number]
    if moved:
        return f"has columns on the source that others had the names of (RENAME COLUMN, or dropped and added anew): {', '.join(moved)}"
    types = {column.number: column.type_oid for column in reversed(columns) if column.type_oid}
    doubtful = [
        column.name
        for column in columns_now
        if _is_doubtful(types.get(column.number, column.type_oid), column.type_oid)
    ]
    if doubtful:
        return f"has columns on the source whose type was altered (timestamp to or from timestamptz, a domain to another): {', '.join(doubtful)}"
    return ""


def remember(before: str, now: str) -> str:
    """Give a mark that knows the columns of a later one, too, where `find_rewrite` finds nothing in between.

    So a name that came since, by RENAME COLUMN on both sides, is known when it goes and comes again.
    """
    known = before.split(" ")
    return " ".join([*known, *(column for column in now.split(" ")[1:] if column not in known)])


def _is_doubtful(before: int, now: int) -> bool:
    """Tell whether a type that took the place of another, with no file made, may have the target keep other values.

    A session in UTC writes nothing for timestamp and timestamptz, for which the target's ALTER goes by its own session's zone. Which
    modifier a domain has no stream tells: the target's may have rounded what came.
    """
    return before != now and ({before, now} <= TIMESTAMPS or min(before, now) >= FIXED_OIDS)


def _parse(mark: str) -> tuple[str, list[_Column]]:
    file, *columns = mark.split(" ")
    return file, [_parse_column(column.split(":")) for column in columns if column]


def _parse_column(fields: list[str]) -> _Column:
    number, written_by, *more = fields
    if not more:
        return _Column(int(number), written_by)
    type_oid, name = more
    return _Column(int(number), written_by, int(type_oid), bytes.fromhex(name).decode())
