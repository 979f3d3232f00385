"""`validate` against real servers: what the target could not have at the cutover, and what a database has that is not carried over."""

from __future__ import annotations

import pytest

from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.settings import Settings
from live_migration.coordinator.cutover import CutoverRefused, _require_accounted_for
from live_migration.coordinator.preflight import require_clean, validate
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.schema import restore_schema
from tests.fixtures.fix_postgres import PostgresFactory, execute
from tests.integration.test_conductor import MakeSettings, bench, make_settings, stand_in_for_consumers
from tests.integration.test_hand_over import target_role
from tests.integration.test_preflight import errors, only_error, role, settings, warnings, with_

__all__ = ["make_settings", "role", "settings", "target_role"]

pytestmark = pytest.mark.integration


async def test_a_policy_for_a_role_that_the_target_lacks_is_refused(
    settings: Settings, role: str, target_server: LocalPostgres
) -> None:
    await execute(
        settings.source_uri(),
        "create table t (id int primary key)",
        "create policy for_all on t using (true)",
        "create policy for_me on t to postgres using (true)",
        f"create policy for_one on t to postgres, {role} using (true)",
    )
    try:
        error = await only_error(settings)
        assert f"{role} (policy for_one of public.t)" in error
        assert "postgres" not in error
        await execute(target_server.uri(), f"create role {role}")
        require_clean(await validate(settings))
    finally:
        await execute(settings.source_uri(), "drop table t")
        await execute(target_server.uri(), f"drop role if exists {role}")


async def test_large_objects_that_the_target_has_by_the_same_oids_are_refused(settings: Settings) -> None:
    await execute(
        settings.source_uri(), "select lo_from_bytea(o::oid, 'x') from unnest('{100, 4000000000}'::bigint[]) o"
    )
    await execute(settings.target_uri(), "select lo_from_bytea(o::oid, 'y') from unnest('{200, 300}'::bigint[]) o")
    assert errors(await validate(settings)) == []
    await execute(settings.target_uri(), "select lo_from_bytea(4000000000::bigint::oid, 'y')")
    assert "1 large object with oids of the source's: 4000000000" in await only_error(settings)


async def test_what_only_a_superuser_can_make_is_announced(settings: Settings, target_role: str) -> None:
    await execute(
        settings.source_uri(),
        "create publication of_all for all tables",
        "create publication of_schema for tables in schema public",
        "create publication of_none",
        "create function et() returns event_trigger language plpgsql as 'begin end'",
        "create event trigger et on ddl_command_end execute function et()",
    )
    named = "event trigger et, publication of_all (for all tables), publication of_schema (tables in schema)"
    assert not [each for each in warnings(await validate(settings)) if "no superuser" in each]
    found = await validate(with_(settings, target=settings.target_uri().replace("postgres@", f"{target_role}@")))
    (said,) = [each for each in warnings(found) if "no superuser" in each]
    assert said.endswith(named)
    assert errors(found) == []


async def test_sequences_and_large_objects_that_the_source_s_role_may_not_read_are_named(
    settings: Settings, role: str
) -> None:
    """They are read behind the last barrier; pg_read_all_data does not open large objects."""
    uri = settings.source_uri()
    database = uri.rsplit("/", 1)[1]
    await execute(
        uri,
        f"alter role {role} replication",
        f"grant create on database {database} to {role}",
        "create sequence closed",
        "create sequence open",
        f"grant select on sequence open to {role}",
        "create schema hidden",
        "create sequence hidden.away",
        "grant select on hidden.away to public",
        "select lo_from_bytea(o::oid, 'x') from unnest('{100, 200, 300, 4000000000}'::bigint[]) o",
        "grant select on large object 200 to public",
        f"grant select on large object 300 to {role}",
    )
    mine = with_(settings, source=uri.replace("postgres@", f"{role}@"))
    try:
        assert sorted(errors(await validate(mine))) == [
            "the source's role lacks SELECT on sequences, or USAGE on their schemas: hidden.away, public.closed",
            "the source's role may not read 2 large objects, by oid: 100, 4000000000",
        ]
        await execute(uri, f"grant pg_read_all_data to {role}")
        assert "2 large objects" in await only_error(mine)
        await execute(
            uri, f"alter large object 100 owner to {role}", f"grant select on large object 4000000000 to {role}"
        )
        assert errors(await validate(mine)) == []
    finally:
        await execute(uri, f"reassign owned by {role} to postgres", f"drop owned by {role}")


@pytest.mark.parametrize("change", ["role", "large object", "SELECT on sequences"])
async def test_the_cutover_is_refused_while_the_target_could_not_have_what_follows_the_last_barrier(
    change: str, make_settings: MakeSettings, role: str
) -> None:
    """Where it came after the plan, nobody has looked before."""
    settings = make_settings()
    await execute(settings.source_uri(), "create table t (id int primary key)", "select lo_from_bytea(100, 'x')")
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await stand_in_for_consumers(settings)
        async with b.run.source_session("test") as source:
            await _require_accounted_for(b.run, source)
            if change == "role":
                await b.source(f"create policy one on t to {role} using (true)")
            elif change == "large object":
                await b.target("select lo_from_bytea(100, 'y')")
            else:
                await source.execute(f"create sequence public.s; set role {role}")
                await b.target("create sequence s")
            with pytest.raises(CutoverRefused, match=role if change == "role" else change):
                await _require_accounted_for(b.run, source)
        await b.source("drop table t")


async def test_a_locale_and_settings_of_the_database_that_are_not_carried_over_are_named(
    settings: Settings, role: str, target_server: LocalPostgres, postgres_server: PostgresFactory, unique_name: str
) -> None:
    database = settings.source_uri().rsplit("/", 1)[1]
    await execute(
        settings.source_uri(),
        f"alter database {database} set work_mem = '5MB'",
        f"alter database {database} set app.secret = 's3cret'",
        f"alter role {role} in database {database} set search_path = app",
        f"alter role {role} set statement_timeout = 0",
    )
    await execute(
        target_server.uri(),
        f"create database {unique_name} template template0 locale_provider builtin builtin_locale 'C.UTF-8' lc_collate 'C'",
        f"alter database {unique_name} set work_mem = '5MB'",
    )
    try:
        found = await validate(with_(settings, target=target_server.uri(unique_name)))
        said = [each for each in warnings(found) if "target's database has another" in each]
        assert any("another locale provider than the source's: builtin, not libc" in each for each in said)
        assert any("another ICU or builtin locale than the source's: C.UTF-8, not none" in each for each in said)
        (listed,) = [each for each in warnings(found) if "settings of the source's database" in each]
        assert listed.endswith(f": app.secret, search_path (role {role})")
        assert errors(found) == []
    finally:
        await execute(target_server.uri(), f"drop database {unique_name}")
    old = with_(settings, source=postgres_server(14).uri())
    assert not [each for each in warnings(await validate(old)) if "target's database has another" in each]
