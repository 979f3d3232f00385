"""pgoutput messages: built byte by byte here, read by the decoder."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from live_migration.common.errors import FormatError
from live_migration.common.pgoutput import (
    decode_begin,
    decode_commit,
    decode_logical_message,
    decode_relation,
    decode_truncate,
    relation_oid,
)
from live_migration.common.relation import Column, QualifiedName, Relation, ReplicaIdentity

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=63)
columns = st.builds(Column, names, u32, st.integers(-1, 2**31 - 1), st.booleans())
relations = st.builds(
    Relation,
    u32,
    st.builds(QualifiedName, names, names),
    st.sampled_from(ReplicaIdentity),
    st.lists(columns, max_size=6).map(tuple),
)


def put_string(text: str) -> bytes:
    return text.encode() + b"\0"


def put_relation(relation: Relation, schema: str | None = None) -> bytes:
    head = b"R" + struct.pack(">I", relation.oid)
    named = put_string(relation.name.schema if schema is None else schema) + put_string(relation.name.name)
    listed = b"".join(
        bytes([column.is_key]) + put_string(column.name) + struct.pack(">Ii", column.type_oid, column.type_modifier)
        for column in relation.columns
    )
    return head + named + relation.identity.value.encode() + struct.pack(">H", len(relation.columns)) + listed


def put_message(prefix: str, content: bytes, flags: int, lsn: int) -> bytes:
    return b"M" + struct.pack(">BQ", flags, lsn) + put_string(prefix) + struct.pack(">I", len(content)) + content


@given(u64, i64, u32)
def test_begin_is_read_back_and_refused_cut_short(lsn: int, time: int, xid: int) -> None:
    message = b"B" + struct.pack(">QqI", lsn, time, xid)
    begin = decode_begin(message)
    assert (begin.commit_lsn, begin.commit_time, begin.xid) == (lsn, time, xid)
    with pytest.raises(FormatError):
        decode_begin(message[:-1])


@given(u64, u64, i64)
def test_commit_is_read_back_and_refused_cut_short(lsn: int, end: int, time: int) -> None:
    message = b"C\0" + struct.pack(">QQq", lsn, end, time)
    commit = decode_commit(message)
    assert (commit.commit_lsn, commit.end_lsn, commit.commit_time) == (lsn, end, time)
    with pytest.raises(FormatError):
        decode_commit(message[:-1])


@given(relations)
def test_a_relation_is_read_back(relation: Relation) -> None:
    message = put_relation(relation)
    assert decode_relation(message) == relation
    assert relation_oid(message) == relation.oid


@given(relations, st.data())
def test_a_relation_cut_short_is_refused(relation: Relation, data: st.DataObject) -> None:
    message = put_relation(relation)
    length = data.draw(st.integers(0, len(message) - 1))
    with pytest.raises(FormatError):
        decode_relation(message[:length])


def test_an_empty_schema_is_pg_catalog() -> None:
    relation = Relation(1, QualifiedName("pg_catalog", "t"), ReplicaIdentity.DEFAULT, ())
    assert decode_relation(put_relation(relation, schema="")) == relation


@pytest.mark.parametrize("name", [b"\xff\xfe", b"caf\xe9"])
def test_a_name_that_is_not_utf8_is_refused(name: bytes) -> None:
    with pytest.raises(FormatError, match="UTF-8"):
        decode_relation(b"R\0\0\0\1" + name + b"\0t\0d\0\0")


def test_an_unknown_replica_identity_is_refused() -> None:
    with pytest.raises(FormatError):
        decode_relation(b"R\0\0\0\1s\0t\0x\0\0")


@given(st.lists(u32, max_size=8), st.integers(0, 3))
def test_truncate_is_read_back_and_refused_cut_short(oids: list[int], flags: int) -> None:
    message = b"T" + struct.pack(f">IB{len(oids)}I", len(oids), flags, *oids)
    truncate = decode_truncate(message)
    assert truncate.relation_oids == tuple(oids)
    assert (truncate.cascade, truncate.restart_identity) == (bool(flags & 1), bool(flags & 2))
    with pytest.raises(FormatError):
        decode_truncate(message[:-1])


@given(names, st.binary(max_size=50), st.booleans(), u64, st.data())
def test_a_logical_message_is_read_back_and_refused_cut_short(
    prefix: str, content: bytes, transactional: bool, lsn: int, data: st.DataObject
) -> None:
    message = put_message(prefix, content, int(transactional), lsn)
    found = decode_logical_message(message)
    assert (found.transactional, found.lsn, found.prefix, found.content) == (transactional, lsn, prefix, content)
    with pytest.raises(FormatError):
        decode_logical_message(message[: data.draw(st.integers(0, len(message) - 1))])


@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_a_format_error_or_a_message(message: bytes) -> None:
    for decode in (decode_begin, decode_commit, decode_relation, decode_truncate, decode_logical_message):
        try:
            decode(message)
        except FormatError:
            continue
