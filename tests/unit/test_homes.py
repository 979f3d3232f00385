"""Which hypertable a relation of the stream belongs to: from catalogs, from the stream's catalog rows, from what was learnt before."""

from __future__ import annotations

import struct

import pytest

from live_migration.common.control import HOMES_A_RECORD, pack_homes, unpack_homes
from live_migration.common.errors import FormatError
from live_migration.common.home import Home, decode_home, decode_suspect, encode_home, encode_suspect
from live_migration.common.relation import Column, QualifiedName, Relation, ReplicaIdentity
from live_migration.common.timescale import Chunk, Hypertable, Layout
from live_migration.producer.homes import CATALOG_SCHEMA, Homes, StaleHomes, parse_relation

ROOT, CHUNK = QualifiedName("app", 'Odd"name'), QualifiedName("store", "rd 1.chunk")
LAYOUT = Layout(
    "2.29.2",
    {10: Hypertable(3, 10, ROOT, "time")},
    {11: Chunk(11, CHUNK, 10, "true", 12)},
    {12: 11},
    {12: QualifiedName("store", "rd_1_compressed")},
    own_tables=frozenset({QualifiedName("_timescaledb_internal", "bgw_job_stat")}),
)


def catalog(table: str, *columns: str) -> Relation:
    return Relation(
        1,
        QualifiedName(CATALOG_SCHEMA, table),
        ReplicaIdentity.DEFAULT,
        tuple(Column(c, 25, -1, False) for c in columns),
    )


def insert(*values: str | None) -> bytes:
    body = b"".join(b"n" if v is None else b"t" + struct.pack(">I", len(v.encode())) + v.encode() for v in values)
    return b"I" + struct.pack(">I", 1) + b"N" + struct.pack(">H", len(values)) + body


def learn(homes: Homes, relation: Relation, *values: str | None) -> None:
    homes.learn_columns(relation)
    homes.learn_row(relation.name, insert(*values))


def test_chunks_and_compressed_tables_of_the_catalog_have_homes() -> None:
    homes = Homes(LAYOUT, {})
    assert homes.find(CHUNK) == Home(ROOT, CHUNK)
    assert homes.find(QualifiedName("store", "rd_1_compressed")) == Home(ROOT, CHUNK, is_compressed=True)
    assert homes.find(ROOT) is None
    assert homes.is_hidden(QualifiedName("_timescaledb_internal", "bgw_job_stat"))
    assert not homes.is_hidden(QualifiedName("public", "plain"))


@pytest.mark.parametrize("layout", ["2.29", "before"])
def test_a_chunk_that_the_stream_shows_being_made_is_learnt_and_kept(layout: str) -> None:
    homes = Homes(LAYOUT, {})
    made = QualifiedName("store", 'rd "2" chunk')
    if layout == "2.29":
        learn(homes, catalog("chunk", "id", "relid", "hypertable_id"), "7", 'store."rd ""2"" chunk"', "3")
    else:
        learn(
            homes,
            catalog("chunk", "id", "hypertable_id", "schema_name", "table_name"),
            "7",
            "3",
            made.schema,
            made.name,
        )
    assert homes.find(made) == Home(ROOT, made)
    learn(homes, catalog("compression_settings", "relid", "compress_relid"), 'store."rd ""2"" chunk"', "store.z")
    later = Homes(
        Layout("2.29.2"), unpack_homes(dict(pack_homes(homes.learnt)))
    )  # both are gone from the source by now
    assert later.find(made) == Home(ROOT, made)
    assert later.find(QualifiedName("store", "z")) == Home(ROOT, made, is_compressed=True)


def test_a_chunk_of_the_catalogs_is_kept_for_when_it_is_gone() -> None:
    """Its changes may be unread yet."""
    later = Homes(Layout("2.29.2"), Homes(LAYOUT, {}).learnt)
    assert later.find(CHUNK) == Home(ROOT, CHUNK)
    assert later.find(QualifiedName("store", "rd_1_compressed")) == Home(ROOT, CHUNK, is_compressed=True)


def test_a_chunk_that_was_detached_is_nobodys() -> None:
    homes = Homes(Layout("2.29.2"), Homes(LAYOUT, {}).learnt, left={CHUNK})
    assert homes.find(CHUNK) is None
    assert homes.find(QualifiedName("store", "rd_1_compressed")) == Home(ROOT, CHUNK, is_compressed=True)


def test_many_homes_are_many_records_of_which_only_new_ones_are_written() -> None:
    homes = {f"s.c{number}": ("s", "h", "s", f"c{number}", "") for number in range(2 * HOMES_A_RECORD)}
    records = dict(pack_homes(homes))
    assert [*records] == [b"homes", b"homes/1"]
    assert unpack_homes(records) == homes
    assert pack_homes(homes, len(homes)) == []
    more = {**homes, "s.z": ("s", "h", "s", "c1", "z")}
    added = dict(pack_homes(more, len(homes)))
    assert [*added] == [b"homes/2"]
    assert unpack_homes(records | added) == more
    with pytest.raises(ValueError, match="decompressing"):
        unpack_homes({b"homes": b'{"packed": "0000"}'})


def test_a_hypertable_that_the_stream_shows_being_made_has_chunks() -> None:
    homes = Homes(Layout("2.29.2"), {})
    hypertables = catalog("hypertable", "id", "schema_name", "table_name", "compression_state")
    learn(homes, hypertables, "8", "public", "new", "0")
    learn(homes, hypertables, "9", "_timescaledb_internal", "_compressed_hypertable_9", "2")
    chunks = catalog("chunk", "id", "relid", "hypertable_id")
    learn(homes, chunks, "1", "_timescaledb_internal._hyper_8_1_chunk", "8")
    learn(homes, chunks, "2", "_timescaledb_internal.compress_hyper_9_2_chunk", "9")
    learn(homes, chunks, "3", "12345", "8")  # a relation that is gone prints as its number
    name = QualifiedName("_timescaledb_internal", "_hyper_8_1_chunk")
    assert homes.find(name) == Home(QualifiedName("public", "new"), name)
    assert homes.find(QualifiedName("_timescaledb_internal", "compress_hyper_9_2_chunk")) is None


def test_a_source_without_it_learns_nothing() -> None:
    homes = Homes(None, {})
    assert not homes.is_used
    assert homes.find(CHUNK) is None


def test_homes_and_suspects_as_frames() -> None:
    for home in (Home(ROOT, CHUNK), Home(ROOT, CHUNK, is_compressed=True)):
        assert decode_home(encode_home(77, home)) == (77, home)
    assert decode_suspect(encode_suspect(78)) == 78
    for wrong in (b"h", encode_home(1, Home(ROOT, CHUNK))[:-3], b"h\0\0\0\1x" + b"a\0b\0c\0d\0"):
        with pytest.raises(FormatError):
            decode_home(wrong)


@pytest.mark.parametrize(
    ("text", "name"),
    [("a.b", ("a", "b")), ('"A ""x"".y"."b"', ('A "x".y', "b")), ("123", None), ("", None)],
)
def test_relations_as_regclass_prints_them(text: str, name: tuple[str, str] | None) -> None:
    assert parse_relation(text) == (QualifiedName(*name) if name else None)


def test_a_relation_that_came_after_the_source_was_asked_makes_the_session_begin_anew_once() -> None:
    known, new = QualifiedName("public", "known"), QualifiedName("public", "new")
    homes = Homes(LAYOUT, {}, {known})
    homes.require_known(known)
    homes.require_known(CHUNK)
    with pytest.raises(StaleHomes, match="new"):
        homes.require_known(new)
    Homes(LAYOUT, {}, {known, new}).require_known(new)  # asked for, and still nobody's chunk
    Homes(None, {}, {known}).require_known(new)  # no TimescaleDB there
