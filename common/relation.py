"""Relations as both sides see them: names, columns, replica identity."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

FIXED_OIDS = 10000
"""Below it a type has the same oid on every server; from it on types are made by initdb, by extensions or by users."""

TIMESTAMPS = frozenset({1114, 1184})
"""Without and with time zone: the session's time zone turns one into the other."""


def quote_identifier(name: str) -> str:
    """Quote one identifier for SQL, whatever it holds."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Quote a string for SQL under standard_conforming_strings, whatever it holds."""
    quoted = text.replace("'", "''")
    return " E'" + quoted.replace("\\", "\\\\") + "'" if "\\" in text else f"'{quoted}'"


@dataclass(frozen=True, slots=True, order=True)
class QualifiedName:
    """Schema and name of a relation, unquoted."""

    schema: str
    name: str

    @property
    def sql(self) -> str:
        """Both parts quoted, for use in a statement."""
        return f"{quote_identifier(self.schema)}.{quote_identifier(self.name)}"

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


class ReplicaIdentity(Enum):
    """What an UPDATE or DELETE in the WAL says of the old row (`pg_class.relreplident`)."""

    DEFAULT = "d"
    NOTHING = "n"
    FULL = "f"
    INDEX = "i"


@dataclass(frozen=True, slots=True)
class Column:
    """A column as a Relation message gives it.

    `is_key`: part of the replica identity. `type_oid` is the source's; user-defined types have another oid on the target.
    """

    name: str
    type_oid: int
    type_modifier: int
    is_key: bool


@dataclass(frozen=True, slots=True)
class Relation:
    """A Relation message: a published table as the stream describes it, columns in attnum order, dropped ones left out."""

    oid: int
    name: QualifiedName
    identity: ReplicaIdentity
    columns: tuple[Column, ...]

    @property
    def key_indexes(self) -> tuple[int, ...]:
        """Positions in `columns` of the replica identity's columns."""
        return tuple(i for i, column in enumerate(self.columns) if column.is_key)
