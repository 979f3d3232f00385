"""What a hostile schema or workload does to decoding, folding and applying: real pgoutput of a real source, without Kafka."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.errors import LaneStopped
from live_migration.consumer.applier import Applier
from tests.integration.test_applier import Pair, pair

__all__ = ["pair"]

pytestmark = pytest.mark.integration

SCENARIOS = {
    "exclusion index before the identity's": (
        """create table t (r int4range not null, v int, exclude using gist (r with &&) where (v > 100));
           create unique index t_r on t (r); alter table t replica identity using index t_r""",
        ["insert into t values ('[1,10)', 1), ('[5,15)', 2)", "update t set v = 3 where r = '[1,10)'", "delete from t where v = 2"],
    ),
    "identifiers that end the quoting of a loop": (
        """create table "a$apply$b" (id numeric primary key, "v$apply$" int, "it's" text, "s" int, "hit" int, "op" int, "seq" int)""",
        ['insert into "a$apply$b" values (1, 1, \'x\', 1, 2, 3, 4)', 'update "a$apply$b" set "v$apply$" = 2, s = 5, hit = 6, op = 7, seq = 8'],
    ),
    "identity generated always beside the key, TOAST unchanged": (
        """create table t (id uuid primary key default gen_random_uuid(), n bigint generated always as identity, v int, body text);
           alter table t alter body set storage external""",
        ["insert into t (v, body) select i, repeat('x', 5000) from generate_series(1, 20) i", "update t set v = v + 1", "update t set n = default, v = 0 where v > 15", "update t set n = default where v = 4"],
    ),
    "identity generated always as the key, TOAST unchanged": (
        "create table t (id int primary key generated always as identity, body text, \"{}\" int); alter table t alter body set storage external",
        ["insert into t (body) select repeat('x', 5000) from generate_series(1, 20) i", "update t set id = default where id > 15"],
    ),
    "identity generated always without a key": (
        "create table t (n int generated always as identity, v int); alter table t replica identity full",
        ["insert into t (v) select i from generate_series(1, 9) i", "update t set v = v + 1", "update t set n = default where v > 5"],
    ),
    "identity generated always, one by one because of the key": (
        "create table t (id numeric primary key, n bigint generated always as identity, v int)",
        ["insert into t (id, v) select i, i from generate_series(1, 9) i; update t set v = v + 1", "update t set n = default where v > 5; insert into t (id, v) values (10, 0)"],
    ),
    "zero columns": (
        "create table t (); alter table t replica identity full",
        ["insert into t default values", "insert into t default values", "delete from t where ctid = '(0,1)'"],
    ),
    "inheritance": (
        "create table t (id int primary key, v int); create table u (primary key (id)) inherits (t)",
        ["insert into t values (1, 1)", "insert into u values (1, 2)", "update t set v = v + 10", "delete from only t",
         "insert into t values (1, 5)", "truncate only t", "insert into t values (2, 2); delete from t where id = 1"],
    ),
    "swap, chain and reuse of keys": (
        "create table t (id int primary key, u int unique, v text)",
        ["insert into t select i, i, i::text from generate_series(1, 9) i",
         "update t set id = id + 100 where id <= 3; update t set id = 104 - id where id > 100",
         "delete from t where id = 9; insert into t values (9, 9, 'again'); update t set id = 10 where id = 9",
         "update t set u = -1 where id = 2; update t set u = 2 where u = 3; update t set u = 3 where u = -1",
         "delete from t where id = 5; update t set id = 5 where id = 6; insert into t values (6, 5, 'six')"],
    ),
    "text key of a domain over citext": (
        "create extension citext; create domain d as citext; create table t (id d primary key, v int)",
        ["insert into t values ('a', 1)", "update t set id = 'A' where id = 'a'", "delete from t where id = 'A'; insert into t values ('a', 3)"],
    ),
    "key of a domain of an enum": (
        "create type mood as enum ('a', 'b', 'c', 'd'); create domain m as mood not null; create table t (k m, n int, v m, primary key (k, n))",
        ["insert into t values ('a', 1, 'a'), ('b', 2, 'b'), ('c', 3, 'c')", "update t set v = 'd' where n = 1; update t set n = 5 where n = 2; delete from t where n = 3"],
    ),
    "domains that refuse NULL": (
        """create domain d as numeric(8,2) not null; create domain e as d check (value is not null); create domain s as varchar(9) not null check (value > '');
           create table t (id e primary key, v e, w s, body text); create table u (v e, w s, j json); alter table u replica identity full;
           alter table t alter body set storage external""",
        ["insert into t select i, i, 'w', repeat('x', 3000) from generate_series(1, 9) i; insert into u select i / 2, 'w', '{}' from generate_series(1, 9) i",
         "delete from t where id = 1; update t set v = v + 1 where id = 2; update t set id = 20 where id = 3; update t set w = 'z', body = 'y' where id = 4",
         "delete from u where v = 1; update u set w = 'z' where v = 2; delete from t where id > 7; insert into t values (8, 8, 'again', 'b')"],
    ),
    "full, key of another unique index with a nullable column": (
        """create table t (a int, b int not null, v int, unique (a), unique (b)); alter table t replica identity full""",
        ["insert into t values (null, 1, 1), (null, 2, 2)", "update t set v = v + 1", "delete from t where b = 1", "update t set b = 1"],
    ),
    "full without key, equal rows": (
        "create table t (a numeric, b text, j json); alter table t replica identity full",
        ["insert into t values (1.0, 'x', '{}'), (1.00, 'x', '{}'), (1.0, 'x', '{}')", "delete from t where ctid = '(0,1)'",
         "update t set b = 'y' where ctid = '(0,2)'", "insert into t values (1.0, null, null), (1.0, null, null)", "update t set a = 2 where ctid = '(0,5)'"],
    ),
    "generated column": (
        "create table t (id int primary key, v int, g int generated always as (v * 2) stored)",
        ["insert into t values (1, 1), (2, 2)", "update t set v = 5 where id = 1", "delete from t where id = 2", "update t set id = 7"],
    ),
    "deferrable key under full": (
        "create table t (id int primary key deferrable initially deferred, v int); alter table t replica identity full",
        ["insert into t select i, i from generate_series(1, 5) i", "update t set id = id + 1", "insert into t values (2, 0); delete from t where v = 1"],
    ),
    "char and varchar with a length": (
        "create table t (id char(5) primary key, v varchar(3))",
        ["insert into t values ('a', 'x'), ('b  ', 'y')", "update t set v = 'z' where id = 'a'", "update t set id = 'c' where id = 'b'", "delete from t where id = 'a'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("binary", [False, True], ids=["text", "binary"])
@pytest.mark.parametrize("batch", [1, 1_000_000], ids=["one by one", "at once"])
@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_schema_that_is_hard_to_follow_replays_exactly(pair: Pair, name: str, batch: int, binary: bool) -> None:
    schema, scripts = SCENARIOS[name]
    await pair.prepare(schema)
    for script in scripts:
        await pair.source.execute(script)
    if "citext" in name or "enum" in name:
        binary = False
    await pair.replay(binary=binary, most_changes=batch, segments_per_batch=batch)
    tables = await pair.source.fetch(
        "select format('%I.%I', schemaname, tablename) from pg_tables where schemaname = 'public'"
    )
    await pair.assert_equal(tuple(row[0] for row in tables))
    await pair.close()


async def test_a_table_renamed_into_another_lane_stops_it(pair: Pair) -> None:
    """Its changes stand in two lanes then, and the older could be applied last."""
    await pair.prepare("create table t (id int primary key, v int)")
    target = await asyncpg.connect(pair.target_uri)
    await target.execute("update _live_migration.tables set lane = 1")
    await target.close()
    await pair.source.execute("alter table t rename to u; insert into u values (1, 1)")
    with pytest.raises(LaneStopped, match=r"public\.t was renamed to public\.u"):
        await pair.replay(binary=True, most_changes=100, segments_per_batch=100)
    await pair.close()


@pytest.mark.parametrize(("tables", "batch"), [(250, 1_000_000), (200, 4)], ids=["at once", "one after the other"])
async def test_staging_tables_stay_few_however_many_tables_change(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tables: int, batch: int
) -> None:
    """Each costs locks at every COMMIT of its session, and rows of the catalog."""
    found = 0

    async def begin(applier: Applier) -> None:
        nonlocal found
        stages = await applier._connection.fetchval(
            "select count(*) from pg_class where relpersistence = 't' and relkind = 'r'"
        )
        found = max(found, stages)
        await usual(applier)

    usual = Applier.begin
    monkeypatch.setattr(Applier, "begin", begin)
    each = "do $$ begin for i in 1..%s loop execute format('%s', i); commit; end loop; end $$"
    await pair.prepare(each % (tables, "create table t%s (id int primary key, n numeric unique, v text)"))
    for change in (
        "insert into t%1$s values (1, 1), (2, 2), (3, 3); update t%1$s set n = 7 where id = 2; delete from t%1$s where id = 1",
        "update t%1$s set n = n + 1; delete from t%1$s where id = 3",
    ):
        await pair.source.execute(each % (tables, change))
    await pair.replay(binary=True, most_changes=batch, segments_per_batch=batch)
    await pair.assert_equal(tuple(f"t{i}" for i in range(1, tables + 1)))
    assert found <= 100
    await pair.close()


async def test_a_renamed_column_is_not_mistaken_for_a_new_one(pair: Pair) -> None:
    """To add it on the target would leave all rows of before without their value."""
    await pair.prepare("create table t (id int primary key, v int)")
    await pair.source.execute("insert into t values (1, 1)")
    await pair.source.execute("alter table t rename column v to w; update t set w = 2")
    with pytest.raises(LaneStopped) as stopped:
        await pair.replay(binary=True, most_changes=100, segments_per_batch=100)
    assert "(v?): RENAME COLUMN" in stopped.value.hint
    assert "defaults" in stopped.value.hint
    await pair.close()
