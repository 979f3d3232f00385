"""Our sessions, the walsender's included, have settings of their own, whatever database and role say; and nothing on the target
acts while rows arrive."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from tests.e2e.migration import Migration
from tests.support.copying import consumers, contents, plan, run_sql, settings_for, until
from tests.support.workload import differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

HOSTILE = {
    "source": {
        "datestyle": "'SQL, DMY'",
        "intervalstyle": "'sql_standard'",
        "extra_float_digits": "-10",
        "search_path": "hostile, pg_catalog, public",
        "default_transaction_isolation": "serializable",
        "standard_conforming_strings": "off",
        "bytea_output": "escape",
        "timezone": "'Asia/Kolkata'",
    },
    "target": {
        "datestyle": "'SQL, MDY'",
        "intervalstyle": "'postgres'",
        "search_path": "hostile, pg_catalog, public",
        "default_transaction_isolation": "serializable",
        "standard_conforming_strings": "off",
        "timezone": "'America/New_York'",
    },
}
SCHEMA = """
    create schema hostile;
    create function hostile.never(a int, b int) returns boolean language sql as 'select false';
    create operator hostile.= (leftarg = int, rightarg = int, function = hostile.never);
    create type public.kind as enum ('a', 'b');
    create table public.t (
        id int primary key, kind public.kind, day date, at timestamptz, span interval, value float8, raw bytea, said text
    );
"""
FILL = r"""
    insert into public.t select i, 'a', date '2026-01-02' + i, timestamptz '2026-01-02 03:04:05.678+00' + i * interval '1 day',
        interval '-1 day -02:03:04' * i, i / 3.0::float8, decode('5c00ff27', 'hex'), E'tab\t back\\slash ''quote'
    from generate_series({first}, {first} + 9) i
"""


async def test_settings_of_the_databases_change_no_value(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """As text, for an enum is among the columns: a day would change places with its month, an interval its sign."""
    source = await asyncpg.connect(source_database)
    await source.execute("set standard_conforming_strings = on")
    await source.execute(SCHEMA + FILL.format(first=0))
    for uri, side in ((source_database, "source"), (target_database, "target")):
        connection = await asyncpg.connect(uri)
        for name, value in HOSTILE[side].items():
            await connection.execute(f"alter database {uri.rsplit('/', 1)[1]} set {name} = {value}")
        await connection.close()
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await source.execute(FILL.format(first=10))
        await source.execute("update public.t set day = day + 1, span = span * 2, value = value / 7 where id % 2 = 0")
        await source.execute("delete from public.t where id = 3")
        await migration.finish()
    rows = []
    for uri in (source_database, target_database):
        plain = {
            "datestyle": "ISO",
            "intervalstyle": "postgres",
            "timezone": "UTC",
            "extra_float_digits": "3",
            "bytea_output": "hex",
            "search_path": "",
        }
        connection = await asyncpg.connect(uri, server_settings=plain)
        rows.append(await connection.fetch("select t::text from public.t order by 1"))
        await connection.close()
    assert rows[0] == rows[1]
    assert len(rows[0]) == 19
    await source.close()


async def test_rows_that_a_policy_hides_are_not_left_out(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """A role that a policy filters for gets an error, never the part of the rows that it may see."""
    role = f"role_{unique_name}"
    admin = await asyncpg.connect(source_database)
    await admin.execute(
        f"""create role {role} login replication password 'pw'; create table public.t (id int primary key);
            insert into public.t select generate_series(1, 100); grant all on public.t to {role};
            alter table public.t enable row level security; create policy few on public.t using (id < 10)"""
    )
    restricted = await asyncpg.connect(source_database.replace("postgres@", f"{role}:pw@"))
    try:
        assert await restricted.fetchval("select count(*) from public.t") == 9
        await run_sql(target_database, "create table public.t (id int)")
        await plan(source_database, target_database)
        async with consumers(settings_for(source_database.replace("postgres@", f"{role}:pw@"), target_database)):
            error = await until(target_database, "select error from _live_migration.tables where error is not null")
            assert "row-level security" in error
        assert await contents(target_database) == {"public.t": (["id"], [])}
    finally:
        await restricted.close()
        await admin.execute(f"drop owned by {role}; drop role {role}")
        await admin.close()


ACTING = """
    create table audit (op text, id int);
    create table t (id int primary key, v int);
    create function act() returns trigger language plpgsql as $$
    begin insert into public.audit values (tg_op, new.id); new.v := new.v + 1; return new; end $$;
    create trigger act before insert or update on t for each row execute function act();
    alter table t enable always trigger act;
    create table watched (id int primary key);
    create rule also as on insert to watched do also insert into public.audit values ('rule', new.id);
    insert into t select i, i from generate_series(1, 50) i;
    insert into watched select generate_series(1, 50);
"""


async def test_triggers_and_rules_that_act_always_act_on_the_source_alone(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """ALWAYS triggers fire in the replica role too: they must not be there before the cutover."""
    source = await asyncpg.connect(source_database)
    await source.execute(ACTING)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await source.execute("insert into t values (100, 1), (101, 1); update t set v = v * 10 where id < 5")
        await source.execute("insert into watched values (100)")
        await migration.finish()
    tables = ("t", "audit", "watched")
    assert not differences(await read_rows(source_database, tables), await read_rows(target_database, tables))
    target = await asyncpg.connect(target_database)
    assert await target.fetchval("select tgenabled from pg_trigger where tgname = 'act'") == b"A"
    await target.close()
    await source.close()
