"""Which columns hash to the same on every server, as the server's catalog tells their types."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.hashing import read_encoding, read_hashed

pytestmark = pytest.mark.integration

_TABLE = """
    create type mood as enum ('sad', 'ok');
    create type pair as (a int, m mood);
    create type even as (a int, b text);
    create domain moods as mood[];
    create domain code as uuid check (value is not null);
    create type span as range (subtype = mood);
    create type whole as range (subtype = int8);
    create table hashed (
        a_text text, a_uuid uuid, a_code code, a_stamp timestamptz, a_numeric numeric, a_list int[], a_whole whole, an_even even, an_oid oid,
        a_mood mood, b_moods moods, c_list mood[], d_span span, e_pair pair, f_pairs pair[], g_class regclass, h_types regtype[],
        i_line line, dropped mood
    );
    alter table hashed drop column dropped;
"""


async def test_what_takes_in_an_oid_is_told_from_what_does_not(source_database: str) -> None:
    connection = await asyncpg.connect(source_database)
    try:
        await connection.execute(_TABLE)
        oid = await connection.fetchval("select 'hashed'::regclass::oid")
        found = {name: each for (_, name), each in (await read_hashed(connection, [oid])).items()}
        assert await read_encoding(connection) == "UTF8"
    finally:
        await connection.close()
    assert {name for name, each in found.items() if each.has_oids} == {
        *("a_mood", "b_moods", "c_list", "d_span", "e_pair", "f_pairs", "g_class", "h_types")
    }
    assert {name for name, each in found.items() if each.has_references} == {"g_class", "h_types"}
    assert {name for name, each in found.items() if each.has_others} == {"i_line"}
    by_value = {name for name, each in found.items() if each.is_by_value(same_encoding=True)}
    assert by_value == {
        *("a_text", "a_uuid", "a_code", "a_stamp", "a_numeric", "a_list", "a_whole", "an_even", "an_oid"),
    }
    assert by_value - {"a_text", "an_even"} == {
        name for name, each in found.items() if each.is_by_value(same_encoding=False)
    }
