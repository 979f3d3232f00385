"""Keys whose index is built first and becomes the constraint afterwards, so that their table's other indexes are built beside it. Pure.

ALTER TABLE ADD CONSTRAINT keeps its table to itself while it sorts every row; CREATE UNIQUE INDEX does not mind other builds, and
ADD CONSTRAINT USING INDEX takes a moment.
"""

from __future__ import annotations

import re

_NAME = r'(?:[a-z_][a-z0-9_]*|"(?:[^"]|"")+")'
_QUOTED = r"'(?:[^']|'')*'"
_OPTIONS = rf"\((?:[^()'\"]|{_QUOTED})*\)"
_COLUMNS = rf"\({_NAME}(?:,\ {_NAME})*\)"
_KEY = re.compile(
    rf"""(?P<alter>ALTER\ TABLE\ (?:ONLY\ )?)(?P<table>{_NAME}\.{_NAME})\s+ADD\ CONSTRAINT\ (?P<name>{_NAME})
        \ (?P<kind>PRIMARY\ KEY|UNIQUE)(?P<nulls>\ NULLS\ NOT\ DISTINCT)?\ (?P<columns>{_COLUMNS})
        (?P<include>\ INCLUDE\ {_COLUMNS})?(?P<options>\ WITH\ {_OPTIONS})?
        (?P<deferrable>(?:\ DEFERRABLE)?(?:\ INITIALLY\ DEFERRED)?)(?P<rest>\s*(?:;.*)?)""",
    re.VERBOSE | re.DOTALL,
)


def split_key(statements: str) -> tuple[str, str] | None:
    """Give the statement that builds a key's index, and those that make it the constraint; None where there is no such way.

    Args:
        statements: what pg_dump gives for a constraint of a plain table.
    """
    found = _KEY.fullmatch(statements)
    if found is None:  # an exclusion constraint, WITHOUT OVERLAPS, or what a later version writes
        return None
    alter, table, name, kind, nulls, columns, include, options, deferrable, rest = (
        part or "" for part in found.groups()
    )
    build = f"CREATE UNIQUE INDEX {name} ON {table} USING btree {columns}{include}{nulls}{options}"
    return build, f"{alter}{table} ADD CONSTRAINT {name} {kind} USING INDEX {name}{deferrable}{rest}"
