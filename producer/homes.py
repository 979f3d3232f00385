"""Which hypertable a relation of the stream belongs to: from the stream's own catalog rows first, from the source's catalogs second.

A chunk that was made and dropped while we lagged is in no catalog any more; the row that made it stands in the stream before
its own first row. And one that the catalogs showed to an earlier session may be gone while its changes are unread. So all that was
ever known is kept in the control topic (`learnt`), from the coordinator's look at the source where the change log begins.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import asyncpg

from live_migration.common import control, pgoutput
from live_migration.common.errors import ConnectionLost
from live_migration.common.home import Home
from live_migration.common.postgres import asking, session
from live_migration.common.relation import QualifiedName, Relation
from live_migration.common.timescale import Layout, can_watch_compressed, read_layout
from live_migration.producer.publication import FIRST_WITH_SCHEMA_PUBLICATIONS

CATALOG_SCHEMA = "_timescaledb_catalog"
CATALOG_TABLES = ("hypertable", "chunk", "compression_settings")
"""What the source publishes of its catalog, inserts alone."""

_PART = re.compile(r'"((?:[^"]|"")*)"|([^".]+)')
_COMPRESSED_HYPERTABLE = b"2"

_IS_PUBLISHED = """
    select exists (select from pg_publication_tables
                   where pubname = any($1::text[]) and schemaname = '_timescaledb_catalog' and tablename = 'chunk')
"""
_PRESENT = """
    select n.nspname::text, c.relname::text from unnest($1::text[], $2::text[]) as asked (schema, name)
    join pg_namespace n on n.nspname = asked.schema join pg_class c on c.relnamespace = n.oid and c.relname = asked.name
"""
_RELATIONS = """
    select n.nspname::text, c.relname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.relkind in ('r', 'p')
"""


def parse_relation(text: str) -> QualifiedName | None:
    """Read a relation as regclass prints it under an empty search_path; None where it is but a number: it is gone."""
    parts = [quoted.replace('""', '"') if quoted else plain for quoted, plain in _PART.findall(text)]
    return QualifiedName(parts[0], parts[1]) if len(parts) == 2 else None


class StaleHomes(ConnectionLost):
    """A relation is in the stream that came after the source's catalogs were read: the session begins anew, with what they say now."""

    def __init__(self, name: QualifiedName) -> None:
        super().__init__(f"relation {name} is new on the source")
        self.name = name


class Homes:
    """Knows the homes of relations, by name, for one session of the stream.

    `known`: the relations that the source had when it was asked; None: any may be. `left`: relations of the source that are no
    part of a hypertable any more.
    """

    def __init__(
        self,
        layout: Layout | None,
        learnt: Mapping[str, tuple[str, ...]],
        known: Collection[QualifiedName] | None = None,
        *,
        shows_compression: bool = True,
        left: Collection[QualifiedName] = (),
    ) -> None:
        self._known = known
        self.shows_compression = shows_compression
        """Whether all rows that are compressed are in the stream; else those that come back by decompression are the only trace."""
        self.is_used = layout is not None
        """Whether the source has TimescaleDB."""
        self.learnt: control.Homes = dict(learnt)
        """All that is known, as it is kept; only ever added to."""
        self._homes: dict[QualifiedName, Home] = {}
        self._hypertables: dict[int, QualifiedName] = {}
        self._hidden: set[QualifiedName] = set()
        self._columns: dict[str, tuple[str, ...]] = {}
        for name, (schema, table, chunk_schema, chunk, kind) in self.learnt.items():
            home = Home(QualifiedName(schema, table), QualifiedName(chunk_schema, chunk), kind == "z")
            if (relation := _require(name)) not in left:
                self._homes[relation] = home
        if layout is not None:
            self._take_layout(layout)

    def _take_layout(self, layout: Layout) -> None:
        for hypertable in layout.hypertables.values():
            self._hypertables[hypertable.id] = hypertable.name
        for chunk in layout.chunks.values():
            self._learn(chunk.name, Home(layout.hypertables[chunk.hypertable].name, chunk.name))
        for compressed, name in layout.compressed_names.items():
            owner = layout.chunks.get(layout.compressed[compressed])
            if owner is not None:
                home = Home(layout.hypertables[owner.hypertable].name, owner.name, is_compressed=True)
                self._learn(name, home)
        self._hidden = set(layout.own_tables)

    def find(self, name: QualifiedName) -> Home | None:
        """Give where a relation belongs; None for what is no part of a hypertable, or of one that nobody knows."""
        return self._homes.get(name)

    def require_known(self, name: QualifiedName) -> None:
        """Raise StaleHomes for a relation that came after the source was asked: it may be a chunk."""
        if self.is_used and self._known is not None and name not in self._known and name not in self._homes:
            raise StaleHomes(name)

    def is_hidden(self, name: QualifiedName) -> bool:
        """Tell whether a relation is TimescaleDB's own, whose rows are not replayed."""
        return name.schema == CATALOG_SCHEMA or name in self._hidden

    def learn_columns(self, relation: Relation) -> None:
        """Take note of a catalog table's columns."""
        if relation.name.schema == CATALOG_SCHEMA and relation.name.name in CATALOG_TABLES:
            self._columns[relation.name.name] = tuple(column.name for column in relation.columns)

    def learn_row(self, table: QualifiedName, message: bytes) -> None:
        """Learn from an INSERT into a catalog table."""
        columns = self._columns.get(table.name)
        if columns is None or message[0] != pgoutput.INSERT:
            return
        row = dict(zip(columns, text_values(message), strict=False))
        match table.name:
            case "hypertable":
                self._learn_hypertable(row)
            case "chunk":
                self._learn_chunk(row)
            case "compression_settings":
                self._learn_compressed(row)

    def _learn_hypertable(self, row: Mapping[str, str | None]) -> None:
        schema, name = row.get("schema_name"), row.get("table_name")
        if schema is None or name is None or row.get("compression_state") == _COMPRESSED_HYPERTABLE.decode():
            return
        self._hypertables[int(row["id"] or 0)] = QualifiedName(schema, name)

    def _learn_chunk(self, row: Mapping[str, str | None]) -> None:
        name = _chunk_name(row)
        hypertable = self._hypertables.get(int(row["hypertable_id"] or 0))
        if name is not None and hypertable is not None:
            self._learn(name, Home(hypertable, name))

    def _learn_compressed(self, row: Mapping[str, str | None]) -> None:
        chunk, compressed = parse_relation(row.get("relid") or ""), parse_relation(row.get("compress_relid") or "")
        home = self._homes.get(chunk) if chunk else None
        if compressed is not None and home is not None:
            self._learn(compressed, Home(home.hypertable, home.chunk, is_compressed=True))

    def _learn(self, name: QualifiedName, home: Home) -> None:
        if self._homes.get(name) == home:
            return
        self._homes[name] = home
        kind = "z" if home.is_compressed else ""
        self.learnt[name.sql] = (
            home.hypertable.schema, home.hypertable.name, home.chunk.schema, home.chunk.name, kind
        )  # fmt: skip


def _chunk_name(row: Mapping[str, str | None]) -> QualifiedName | None:
    schema, name = row.get("schema_name"), row.get("table_name")
    if schema is not None and name is not None:  # before 2.29
        return QualifiedName(schema, name)
    return parse_relation(row.get("relid") or "")


def _require(sql: str) -> QualifiedName:
    name = parse_relation(sql)
    assert name is not None, sql
    return name


def text_values(message: bytes) -> list[str | None]:
    """Give the values of an INSERT in text mode; None for NULL and for what is not text."""
    values: list[str | None] = []
    at = 8
    for _ in range(int.from_bytes(message[6:8], "big")):
        kind = message[at : at + 1]
        if kind in (b"t", b"b"):
            length = int.from_bytes(message[at + 1 : at + 5], "big")
            values.append(message[at + 5 : at + 5 + length].decode() if kind == b"t" else None)
            at += 5 + length
        else:
            values.append(None)
            at += 1
    return values


async def read_homes(
    uri: str, learnt: Mapping[str, tuple[str, ...]], publications: Collection[str], gone: Collection[QualifiedName]
) -> Homes:
    """Give what the source's catalogs say now, beside what was learnt.

    Where the catalog is published each new chunk is in the stream before its rows, and nothing need be asked again.
    `gone`: relations that were asked for before; those that are not there now, either, are nobody's chunks.

    Raises:
        ConnectionLost | SourceError: the source does not say.
    """
    async with session(uri, "source", application="live-migration producer") as connection:
        with asking("source", "reading the hypertables"):
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                layout = await read_layout(connection)
                if layout is None:
                    return Homes(layout, learnt)
                is_published = await connection.fetchval(_IS_PUBLISHED, list(publications))
                can_watch = await can_watch_compressed(connection, layout.version)
                rows = [] if is_published else await connection.fetch(_RELATIONS)
                left = await _find_left(connection, layout, learnt)
    # The schemas of chunks are published together with the catalog, where the server can. Where nobody may watch compressed rows
    # (`chunk_watch`) no copy would help for long.
    has_schemas = connection.get_server_version().major >= FIRST_WITH_SCHEMA_PUBLICATIONS
    known = None if is_published else {*(QualifiedName(*row) for row in rows), *gone}
    shows_compression = (is_published and has_schemas) or not can_watch
    return Homes(layout, learnt, known, shows_compression=shows_compression, left=left)


async def _find_left(
    connection: asyncpg.Connection, layout: Layout, learnt: Mapping[str, tuple[str, ...]]
) -> frozenset[QualifiedName]:
    """Give the relations that were part of a hypertable, and are there but are not so any more: detached chunks."""
    parts = {*(chunk.name for chunk in layout.chunks.values()), *layout.compressed_names.values()}
    gone = [name for name in map(_require, learnt) if name not in parts]
    rows = await connection.fetch(_PRESENT, [name.schema for name in gone], [name.name for name in gone])
    return frozenset(QualifiedName(*row) for row in rows)
