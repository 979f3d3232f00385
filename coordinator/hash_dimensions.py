"""Hypertables that are cut by a hash: whether a row's hash on the target is what it is on the source.

Where it is not, the target's chunks take other rows than the source's of the same range: copies stop at a chunk's constraint, queries pass
over the chunk that has the row, and copying a chunk anew takes away another's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.hashing import TEXT_TYPES, Hashed, read_hashed
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.coordinator.findings import Finding, error, warning

_DIMENSIONS = """
    select c.oid, h.schema_name::text as schema, h.table_name::text as name, d.column_name::text as column,
           d.partitioning_func_schema::text as function_schema, d.partitioning_func::text as function
    from _timescaledb_catalog.dimension d join _timescaledb_catalog.hypertable h on h.id = d.hypertable_id
    join pg_namespace n on n.nspname = h.schema_name join pg_class c on c.relnamespace = n.oid and c.relname = h.table_name
    where d.num_slices is not null order by d.id
"""
_OWN_SCHEMAS = frozenset({"_timescaledb_functions", "_timescaledb_internal"})
_OF_TEXT = "get_partition_for_key"
"""TimescaleDB's function that hashes a value's text."""
_OF_VALUE = "get_partition_hash"
"""That which asks the type's own hash function, and which a hypertable gets where none is named."""
_MEND = (
    "Make the hypertable anew on the source, and move its rows: without that dimension, by another column, or with partitioning_func => "
    f"'_timescaledb_functions.{_OF_TEXT}', which hashes the value's text."
)
_ENCODE = "Make the target's database with the source's encoding."


@dataclass(frozen=True, slots=True)
class HashDimension:
    """A column whose hash a hypertable is cut by, and the function that hashes it."""

    hypertable: QualifiedName
    column: str
    function: QualifiedName
    hashed: Hashed

    def __str__(self) -> str:
        return f"{self.hypertable} ({self.column})"

    @property
    def is_own(self) -> bool:
        """Whether the function is the user's."""
        return self.function.schema not in _OWN_SCHEMAS or self.function.name not in (_OF_TEXT, _OF_VALUE)

    @property
    def has_oids(self) -> bool:
        """Whether oids go into the hash, which are others on the target."""
        return not self.is_own and self.function.name == _OF_VALUE and self.hashed.has_oids

    @property
    def is_of_text(self) -> bool:
        """Whether the bytes of text go into the hash, which depend on the database's encoding."""
        if self.is_own:
            return False
        return bool(self.hashed.types & TEXT_TYPES) or (self.function.name == _OF_TEXT and self.hashed.has_oids)

    @property
    def is_of_others(self) -> bool:
        """Whether the hash function of a type goes in that is not PostgreSQL's."""
        return not self.is_own and self.hashed.has_others


async def read_hash_dimensions(source: asyncpg.Connection) -> list[HashDimension]:
    """Give the dimensions of all hypertables that are cut by a hash; TimescaleDB must be there."""
    rows = await source.fetch(_DIMENSIONS)
    hashed = await read_hashed(source, {row["oid"] for row in rows})
    unknown = Hashed(frozenset(), has_others=True, has_oids=False)
    return [
        HashDimension(
            QualifiedName(row["schema"], row["name"]),
            row["column"],
            QualifiedName(row["function_schema"] or "_timescaledb_functions", row["function"] or _OF_VALUE),
            hashed.get((row["oid"], row["column"]), unknown),
        )
        for row in rows
    ]


def assess_hash_dimensions(dimensions: Sequence[HashDimension], encoding: str, target_encoding: str) -> list[Finding]:
    """Judge them; an error where a value's hash is another on the target, a warning where nobody but the user can tell. Pure."""
    of_text = [] if encoding == target_encoding else [each for each in dimensions if each.is_of_text]
    own = [f"{each}: {each.function}" for each in dimensions if each.is_own]
    return [
        *_say(
            error,
            (each for each in dimensions if each.has_oids),
            "hypertables are cut by the hash of a value that has an oid in it, as an enum's has: on the target it is another, and rows would be lost",
            _MEND,
        ),
        *_say(
            error,
            of_text,
            f"hypertables are cut by the hash of text, whose bytes are others in the target's encoding ({target_encoding}, not {encoding}), and rows "
            "would be lost",
            _ENCODE,
        ),
        *_say(
            warning,
            (each for each in dimensions if each.is_of_others),
            "hypertables are cut by the hash of a type that is not PostgreSQL's own: rows would be lost should it be another on the target",
            "The type's extension must hash a value to the same there: one version on both ends, and, as for citext, one locale.",
        ),
        *_say(
            warning,
            own,
            "hypertables are cut by partitioning functions of users: rows would be lost should one give another result on the target",
            "Such a function must depend on the value alone: not on oids, settings, time zones or other tables.",
        ),
    ]


def _say(judge: Callable[[str, str], Finding], which: Iterable[object], what: str, hint: str) -> list[Finding]:
    names = [str(each) for each in which]
    return [judge(f"{what}: {name_list(names)}", hint)] if names else []
