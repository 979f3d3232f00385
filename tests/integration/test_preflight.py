"""`validate` against real servers: each bad input of its own, named before anything is touched, and no password shown."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from live_migration.common import kafka, state
from live_migration.common.catalog import TableInfo
from live_migration.common.errors import LiveMigrationError
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.postgres import Side
from live_migration.common.settings import Settings, load_settings
from live_migration.coordinator import big_rows, preflight
from live_migration.coordinator.findings import Finding
from live_migration.coordinator.preflight import require_clean, validate
from tests.fixtures.fix_postgres import SETTINGS, PostgresFactory, execute, run_apart

pytestmark = pytest.mark.integration

PASSWORD = "s3cret-Pa55"


@pytest.fixture
def settings(source_database: str, target_database: str, unique_name: str) -> Settings:
    return load_settings({"source": source_database, "target": target_database, "name": unique_name})


@pytest.fixture(scope="module")
def password_server() -> Iterator[LocalPostgres]:
    """A server that asks for passwords."""
    server = LocalPostgres(settings=SETTINGS, password=PASSWORD)
    run_apart(server.start())
    yield server
    run_apart(server.stop())


@pytest.fixture
async def role(source_server: LocalPostgres) -> AsyncIterator[str]:
    """A role on the source that may do nothing."""
    name = f"r_{secrets.token_hex(6)}"
    await execute(source_server.uri(), f"create role {name} login")
    yield name
    await execute(source_server.uri(), f"drop role {name}")


def at(uri: str, **parts: str) -> str:
    """Give a URI with another user, password, port or database."""
    host, _, database = uri.split("@")[1].partition("/")
    user = parts.get("user", "postgres") + (f":{parts['password']}" if "password" in parts else "")
    host = f"127.0.0.1:{parts['port']}" if "port" in parts else host
    return f"postgresql://{user}@{host}/{parts.get('database', database)}"


def with_(settings: Settings, **changes: object) -> Settings:
    return load_settings({**settings.model_dump(exclude_unset=True), **changes})


def errors(found: list[Finding]) -> list[str]:
    return [finding.what for finding in found if finding.level == "error"]


def warnings(found: list[Finding]) -> list[str]:
    return [finding.what for finding in found if finding.level == "warning"]


async def only_error(settings: Settings) -> str:
    found = await validate(settings)
    (error,) = errors(found)
    assert all(finding.hint for finding in found if finding.level == "error")
    with pytest.raises(LiveMigrationError, match=r".+"):
        require_clean(found)
    return error


async def traces(uri: str) -> object:
    """Give what a validation could leave on a server."""
    connection = await asyncpg.connect(uri)
    try:
        return await connection.fetchrow(
            """select (select count(*) from pg_replication_slots where database = current_database()) as slots,
                      (select count(*) from pg_publication) as publications, (select count(*) from pg_class) as relations,
                      (select count(*) from pg_namespace) as schemas"""
        )
    finally:
        await connection.close()


async def test_good_pair_has_no_error_and_is_not_touched(settings: Settings, kafka_bootstrap: str) -> None:
    await execute(settings.source_uri(), "create table t (id int primary key)")
    before = [await traces(settings.source_uri()), await traces(settings.target_uri())]
    found = await validate(with_(settings, kafka=kafka_bootstrap))
    assert errors(found) == []
    require_clean(found)
    assert [await traces(settings.source_uri()), await traces(settings.target_uri())] == before
    async with kafka.admin(with_(settings, kafka=kafka_bootstrap)) as client:
        assert not await kafka.topic_exists(client, settings.changes_topic)


@pytest.mark.parametrize(
    "uri",
    ["nonsense", "mysql://u:s3cret-Pa55@h/d", "postgresql://u:s3cret-Pa55@h:port/d", "postgresql://u:s3cret-Pa55@[h/d"],
)
async def test_wrong_uri_is_named_without_its_content(settings: Settings, uri: str) -> None:
    error = await only_error(with_(settings, source=uri))
    assert "source's URI" in error
    assert PASSWORD not in error


async def test_unreachable_server_hides_no_other_error(settings: Settings) -> None:
    found = errors(await validate(with_(settings, source=at(settings.source_uri(), port="1"), kafka="127.0.0.1:1")))
    assert len(found) == 2
    assert "cannot reach the source at 127.0.0.1:1/" in found[0] + found[1]
    assert "cannot reach Kafka at 127.0.0.1:1" in found[0] + found[1]


async def test_unknown_database_is_named(settings: Settings) -> None:
    error = await only_error(with_(settings, target=at(settings.target_uri(), database="nowhere")))
    assert 'database "nowhere" does not exist' in error


async def test_wrong_password_is_named_and_shown_nowhere(
    settings: Settings, password_server: LocalPostgres, tmp_path: Path
) -> None:
    uri = at(password_server.uri(), password="wrong-" + PASSWORD, port=str(password_server.port), database="postgres")
    error = await only_error(with_(settings, source=uri))
    assert "password authentication failed" in error
    for command in ("validate", "migrate"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "live_migration.coordinator.cli", command,
            "--source", uri, "--target", settings.target_uri(), "--kafka", "127.0.0.1:1", "--log-level", "debug",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=tmp_path,
        )  # fmt: skip
        shown = b"".join(await process.communicate())
        assert process.returncode == 1
        assert b"password authentication failed" in shown
        assert PASSWORD.encode() not in shown
    assert [path for path in tmp_path.rglob("*") if path.is_file() and PASSWORD in path.read_text()] == []


async def test_wal_level_slots_and_senders_are_checked(settings: Settings, kafka_bootstrap: str) -> None:
    async with LocalPostgres(
        settings={"wal_level": "replica", "max_replication_slots": "0", "max_wal_senders": "0"}
    ) as server:
        found = errors(await validate(with_(settings, source=server.uri(), kafka=kafka_bootstrap)))
    assert any("wal_level=replica" in error for error in found)
    assert any("no free replication slot (0 of 0" in error for error in found)
    assert any("no free walsender (0 of 0" in error for error in found)


async def test_limits_of_the_slot_are_named(settings: Settings) -> None:
    limits = {"max_slot_wal_keep_size": "64MB", "wal_sender_timeout": "5s", "idle_replication_slot_timeout": "60s"}
    async with LocalPostgres(settings={**SETTINGS, **limits}) as server:
        found = warnings(await validate(with_(settings, source=server.uri())))
    for name in limits:
        assert any(name in each for each in found), name


async def test_each_right_that_the_source_role_lacks_is_named(settings: Settings, role: str) -> None:
    await execute(settings.source_uri(), "create schema app; create table app.mine (id int primary key, owner name)")
    await execute(settings.source_uri(), "alter table app.mine enable row level security")
    poor = with_(settings, source=at(settings.source_uri(), user=role))
    found = errors(await validate(poor))
    assert any(f"role {role} on the source lacks the REPLICATION attribute" in error for error in found)
    assert any("lacks CREATE on database" in error for error in found)
    assert any("does not own 1 table," in error and "app.mine" in error for error in found)
    assert any("lacks SELECT on: app.mine" in error for error in found)
    assert any("row security would hide rows" in error and "app.mine" in error for error in found)
    await execute(
        settings.source_uri(), f"alter role {role} replication bypassrls", f"alter table app.mine owner to {role}"
    )
    database = settings.source_uri().rpartition("/")[2]
    await execute(
        settings.source_uri(), f"grant create on database {database} to {role}", f"grant usage on schema app to {role}"
    )
    try:
        assert errors(await validate(poor)) == []
    finally:
        await execute(settings.source_uri(), f"drop owned by {role}")


async def test_membership_in_rds_replication_stands_for_the_attribute(settings: Settings, role: str) -> None:
    """As on RDS, where no role but the service's own has the attribute; a server of another kind refuses the connection then."""
    poor = with_(settings, source=at(settings.source_uri(), user=role))
    lacks = f"role {role} on the source lacks the REPLICATION attribute"
    await execute(settings.source_uri(), "create role rds_replication")
    try:
        assert any(lacks in each for each in errors(await validate(poor)))
        await execute(settings.source_uri(), f"grant rds_replication to {role}")
        assert not any(lacks in each for each in errors(await validate(poor)))
    finally:
        await execute(settings.source_uri(), "drop role rds_replication")


async def test_each_right_that_the_target_role_lacks_is_named(settings: Settings, target_server: LocalPostgres) -> None:
    name = f"r_{secrets.token_hex(6)}"
    await execute(target_server.uri(), f"create role {name} login")
    try:
        await execute(settings.source_uri(), "create table t (id int primary key)", "create schema of_extension")
        await execute(settings.source_uri(), "create extension pg_buffercache schema of_extension")  # it has a view
        await execute(settings.target_uri(), "create schema of_extension")
        findings = await validate(with_(settings, target=at(settings.target_uri(), user=name)))
    finally:
        await execute(target_server.uri(), f"drop role {name}")
    found = errors(findings)
    assert not any("of_extension" in error for error in found), "its objects come with the extension"
    assert any(f"role {name} on the target lacks CREATE on the database" in error for error in found)
    (role,) = [
        each for each in findings if f"role {name} on the target may not set session_replication_role" in each.what
    ]
    assert role.level == "warning"
    assert any("lacks CREATE on schemas: public" in error for error in found)


async def test_objects_in_the_way_on_the_target_are_named(settings: Settings) -> None:
    objects = "create table t (id int primary key); create view v as select 1 as x; create type mood as enum ('sad');"
    await execute(settings.source_uri(), objects + "create function f(int) returns int language sql return 1")
    await execute(settings.target_uri(), "create table other (id int)")
    assert errors(await validate(settings)) == []
    await execute(settings.target_uri(), objects + "create function f(int) returns int language sql return 1")
    error = await only_error(settings)
    assert "function public.f(integer), table public.t, type public.mood, view public.v" in error


async def test_source_as_its_own_target_is_refused_by_any_name(settings: Settings) -> None:
    same = settings.source_uri().replace("127.0.0.1", "localhost")
    await execute(settings.source_uri(), "create table t (id int primary key)")
    assert await only_error(with_(settings, target=same)) == "source and target are the same database"


async def test_target_that_is_older_is_refused(settings: Settings, postgres_server: PostgresFactory) -> None:
    found = errors(await validate(with_(settings, target=postgres_server(16).uri())))
    assert "the target runs PostgreSQL 16, older than the source's 18" in found


async def test_kafka_that_cannot_be_reached_is_named(settings: Settings) -> None:
    assert "cannot reach Kafka at 127.0.0.1:1" in await only_error(with_(settings, kafka="127.0.0.1:1"))


async def test_topics_of_the_same_name_are_named(settings: Settings, kafka_bootstrap: str) -> None:
    used = with_(settings, kafka=kafka_bootstrap)
    await kafka.create_topics(used)
    try:
        error = await only_error(used)
    finally:
        await kafka.delete_topics(used)
    assert used.changes_topic in error
    assert used.control_topic in error


async def test_more_replicas_than_brokers_are_refused(settings: Settings, kafka_bootstrap: str) -> None:
    assert "more than Kafka's 1 brokers" in await only_error(
        with_(settings, kafka=kafka_bootstrap, replication_factor=3)
    )


async def test_slot_and_publications_without_state_are_named(settings: Settings) -> None:
    await execute(settings.source_uri(), f"create publication {settings.publication}")
    await execute(settings.source_uri(), f"select pg_create_logical_replication_slot('{settings.slot}', 'pgoutput')")
    found = errors(await validate(settings))
    assert any(f"slot {settings.slot} exists" in error for error in found)
    assert any("publications exist on the source" in error and settings.publication in error for error in found)


async def begin(settings: Settings, source: str, *, name: str) -> None:
    """Put a migration's state on the target as a conductor does, with an expired lease."""
    connection = await asyncpg.connect(settings.target_uri())
    system, database = await _identity(source)
    async with connection.transaction():
        await state.create_schema(connection)
        await connection.execute(
            """insert into _live_migration.migration (id, name, phase, settings, kafka, source_address, source_system,
                   source_timeline, source_database, source_version, topic_id, lane_count, owner, lease_until)
               values (gen_random_uuid(), $1, 'copy', $2, 'h:1', 'h:1/d', $3, 1, $4, 180001, gen_random_uuid(), 8, 'c-1', now())""",
            name,
            json.dumps({}),
            system,
            database,
        )
    await connection.close()


async def _identity(uri: str) -> tuple[str, str]:
    connection = await asyncpg.connect(uri)
    try:
        row = await connection.fetchrow(
            "select system_identifier::text, current_database()::text from pg_control_system()"
        )
        return row[0], row[1]
    finally:
        await connection.close()


async def test_own_migration_is_gone_on_with(settings: Settings) -> None:
    await execute(settings.source_uri(), "create table t (id int primary key)")
    await execute(settings.target_uri(), "create table t (id int primary key)")
    await execute(settings.source_uri(), f"create publication {settings.publication}")
    await begin(settings, settings.source_uri(), name=settings.name)
    found = await validate(settings)
    assert errors(found) == []
    assert any("in phase copy" in each for each in warnings(found))


async def test_migration_that_is_being_run_is_not_run_twice(settings: Settings) -> None:
    await begin(settings, settings.source_uri(), name=settings.name)
    await execute(
        settings.target_uri(), "update _live_migration.migration set lease_until = now() + interval '1 minute'"
    )
    assert "is being run by c-1 already" in await only_error(settings)


async def test_migration_of_another_name_or_source_is_refused(settings: Settings) -> None:
    await begin(settings, settings.source_uri(), name="somebody_elses")
    assert "another migration, somebody_elses" in await only_error(settings)
    await execute(
        settings.target_uri(), f"update _live_migration.migration set name = '{settings.name}', source_system = '1'"
    )
    assert "copies from h:1/d, which is not this source" in await only_error(settings)


async def test_what_the_user_should_know_is_a_warning(settings: Settings) -> None:
    await execute(
        settings.source_uri(),
        "create table no_key (a int)",
        "create table deferred (a int primary key deferrable)",
        "create unlogged table volatile (a int primary key)",
        "create table full_identity (a int, b int generated always as (a) stored)",
        "alter table full_identity replica identity full",
        "select lo_from_bytea(0, 'x')",
        "begin; insert into no_key values (1); prepare transaction 'waits-" + settings.name + "'",
    )
    found = await validate(settings)
    assert errors(found) == []
    said = "\n".join(warnings(found))
    assert "2 tables without replica identity" in said
    assert "public.no_key, public.deferred" in said
    assert "public.volatile" in said
    assert "generated column" in said
    assert "1 large object (" in said
    assert f"waits-{settings.name}" in said
    promised = warnings(await validate(with_(settings, replica_identity_full=True)))
    assert any("REPLICA IDENTITY FULL is given until `clean` to 2 tables" in each for each in promised)


@pytest.mark.parametrize("form", ["binary", "text"])
async def test_rows_too_big_for_a_message_are_named(
    form: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is lowered: a real one takes gigabytes. Compressed values count as long as they travel."""
    monkeypatch.setattr(big_rows, "MESSAGE_BYTES", 1_000_000)
    await execute(
        settings.source_uri(),
        "create table fits (id int primary key, b bytea)",
        "insert into fits values (1, convert_to(repeat('x', 499999), 'utf8'))",
        "create table twice (id int primary key, b bytea, n int)",
        "insert into twice values (1, 'x', 0), (2, convert_to(repeat('x', 600000), 'utf8'), 0)",
        'create table "To""gether" (id int primary key, one text, other varchar)',
        "insert into \"To\"\"gether\" values (1, repeat('x', 600000), repeat('y', 500000))",
    )
    if form == "text":
        await execute(settings.source_uri(), "create type mood as enum ('x')", "create table odd (m mood primary key)")
    said = [each for each in warnings(await validate(settings)) if "none above 1 GB" in each]
    named = sorted(each.partition(" holds")[0] for each in said)
    assert named == ['public.To"gether', *(["public.twice"] if form == "text" else [])]
    assert all("(ctid (0," in each for each in said)
    monkeypatch.setattr(big_rows, "MESSAGE_BYTES", 1_200_000)
    assert not [each for each in warnings(await validate(settings)) if "none above 1 GB" in each]


async def test_a_look_for_big_rows_that_takes_too_long_is_given_up(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(big_rows, "MESSAGE_BYTES", 1_000_000)
    monkeypatch.setattr(big_rows, "_LOOK_SECONDS", 0.2)
    await execute(
        settings.source_uri(),
        "create table t (id int primary key, v text)",
        "insert into t values (1, repeat('x', 2000000))",
    )
    assert [each for each in warnings(await validate(settings)) if "none above 1 GB" in each]
    holder, looker = [await asyncpg.connect(settings.source_uri()) for _ in range(2)]
    async with holder.transaction():
        await holder.execute("lock table t in access exclusive mode")
        assert await big_rows.find_big_rows(looker, is_binary=True) == []
    await holder.close()
    await looker.close()


async def test_a_table_that_is_locked_for_a_moment_is_no_finding(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TRUNCATE that takes its time, or a producer of DDL: `migrate` began anew in the middle of one."""
    await execute(settings.source_uri(), "create table t (id int primary key)")
    holder = await asyncpg.connect(settings.source_uri())
    await holder.execute("begin; lock table t in access exclusive mode")
    list_tables, looks = preflight.list_tables, 0

    async def look(connection: asyncpg.Connection) -> list[TableInfo]:
        nonlocal looks
        looks += 1
        if looks == 2:
            await holder.execute("commit")
        return await list_tables(connection)

    monkeypatch.setattr(preflight, "list_tables", look)
    assert errors(await validate(with_(settings, lock_timeout=0.2))) == []
    assert looks == 2
    await holder.execute("begin; lock table t in access exclusive mode")
    monkeypatch.setattr(preflight, "_PATIENCE_SECONDS", 0.5)
    assert "lock timeout" in await only_error(with_(settings, lock_timeout=0.2))  # it does not wait for ever
    await holder.close()


async def test_sql_ascii_source_is_refused(settings: Settings, source_server: LocalPostgres, unique_name: str) -> None:
    database = f"{unique_name}_ascii"
    await execute(source_server.uri(), f"create database {database} template template0 encoding 'SQL_ASCII' locale 'C'")
    try:
        assert "SQL_ASCII" in await only_error(with_(settings, source=source_server.uri(database)))
    finally:
        await execute(source_server.uri(), f"drop database {database} with (force)")


async def test_extension_that_the_target_lacks_is_an_error_only_where_it_is_used(
    settings: Settings, postgres_server: PostgresFactory
) -> None:
    """Servers from Maven have all of contrib but one that is taken away here."""
    server = postgres_server(18)
    control = server.server_bin.parent / "share" / "postgresql" / "extension" / "citext.control"
    if not control.exists():
        (control,) = server.server_bin.parent.rglob("citext.control")
    await execute(settings.source_uri(), "create extension citext")
    hidden = control.with_suffix(".hidden")
    os.rename(control, hidden)
    try:
        found = await validate(with_(settings, target=server.uri()))
        assert errors(found) == []
        assert any("not available on the target: citext" in each for each in warnings(found))
        await execute(settings.source_uri(), "create table t (k citext primary key)")
        assert "citext" in await only_error(with_(settings, target=server.uri()))
    finally:
        os.rename(hidden, control)


async def test_client_programs_that_are_too_old_are_named(settings: Settings, tmp_path: Path) -> None:
    assert "--pg-bin" in await only_error(with_(settings, pg_bin=tmp_path))


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_server_that_goes_away_in_the_midst_of_the_checks_is_told(
    settings: Settings, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = preflight._Preflight._check_server

    async def cut(self: preflight._Preflight, connection: asyncpg.Connection, of: Side) -> list[Finding]:
        if of == side:
            connection.terminate()
        return await check(self, connection, of)

    monkeypatch.setattr(preflight._Preflight, "_check_server", cut)
    found = errors(await validate(settings))
    assert any(f"the connection to the {side} broke" in error for error in found), found
