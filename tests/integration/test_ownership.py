"""Slot, publications and topics of our name that are another migration's, or our own successor's, are never taken for ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

from live_migration.common.control import CONFIG, OWNER, ProducerConfig
from live_migration.common.errors import (
    ConnectionLost,
    Fenced,
    KafkaError,
    LiveMigrationError,
    SlotError,
    SourceError,
    TargetError,
)
from live_migration.common.kafka import read_control
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.postgres import describe
from live_migration.common.settings import Settings
from live_migration.common.state import Phase
from live_migration.common.supervisor import lock_file
from live_migration.coordinator import clean as cleaning
from live_migration.coordinator import prepare as preparing
from live_migration.coordinator import steps
from live_migration.coordinator.clean import clean
from live_migration.coordinator.migrating import clean_up
from live_migration.coordinator.ownership import sign_topics
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.recopy import begin_recopy
from live_migration.coordinator.timescale_source import AUTO_PUBLICATION
from live_migration.producer import slot
from live_migration.producer.publication import renew_decoding_catalog
from live_migration.producer.slot import SlotTimeout, create_slot
from tests.fixtures.fix_postgres import DatabaseFactory, PostgresFactory, execute
from tests.integration.test_conductor import MakeSettings, bench, fetch, make_settings  # noqa: F401

pytestmark = pytest.mark.integration

TRACES = """
    select slot_name::text as name, confirmed_flush_lsn::text as mark from pg_replication_slots where slot_name = $1
    union all select pubname::text, oid::text from pg_publication where pubname in ($1, $1 || '_insert') order by 1, 2
"""


async def traces(settings: Settings) -> list[tuple[str, str]]:
    """Give slot and publications so that any that is made anew differs."""
    return [tuple(row) for row in await fetch(settings.source_uri(), TRACES, settings.name)]


async def log_of(settings: Settings) -> ProducerConfig:
    return ProducerConfig.model_validate_json((await read_control(settings))[CONFIG])


@pytest.fixture
async def another(
    make_settings: MakeSettings,  # noqa: F811
    fresh_database: DatabaseFactory,
    target_server: LocalPostgres,
    postgres_server: PostgresFactory,
) -> Callable[..., Any]:
    """Give settings of the same name into another target, or also from another source."""

    async def make(*, other_source: bool = False) -> Settings:
        options = {"target": await fresh_database(target_server)}
        if other_source:
            options["source"] = await fresh_database(postgres_server(15))  # slots are the cluster's
        return make_settings(**options)

    return make


Another = Callable[..., Any]


async def test_what_another_migration_of_the_name_made_is_refused_at_every_attempt_and_left_by_clean(
    make_settings: MakeSettings,  # noqa: F811
    another: Another,
) -> None:
    ours, theirs = make_settings(), await another()
    await fetch(ours.source_uri(), "create table t (id int primary key)")
    async with bench(ours) as b:  # both begin, for neither finds anything yet
        async with bench(theirs) as a:
            await prepare(a.run)
        before, log = await traces(theirs), await log_of(theirs)
        for _ in range(2):
            with pytest.raises(SlotError, match="not this migration's"):
                await prepare(b.run)
            assert await traces(theirs) == before
    said: list[str] = []
    await clean(ours, prune=False, note=said.append)
    assert (await traces(theirs), await log_of(theirs)) == (before, log)
    assert any(line.startswith(f"left slot {ours.slot}, publication") for line in said)
    assert await fetch(ours.target_uri(), "select to_regnamespace('_live_migration')") == [(None,)]
    await clean(theirs, prune=False, note=said.append)
    assert await traces(theirs) == []


async def test_two_that_looked_at_the_same_moment_leave_each_others(
    make_settings: MakeSettings,  # noqa: F811
    another: Another,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = make_settings(), await another()
    await fetch(ours.source_uri(), "create table t (id int primary key)")
    require = preparing._require_nothing_there
    async with bench(ours) as b, bench(theirs) as a:

        async def look_and_let_the_other_prepare(*arguments: Any) -> None:
            monkeypatch.setattr(preparing, "_require_nothing_there", require)
            await require(*arguments)
            await preparing.kafka.require_no_topics(ours)
            monkeypatch.setattr(preparing.kafka, "require_no_topics", lambda _: asyncio.sleep(0))
            await prepare(a.run)

        monkeypatch.setattr(preparing, "_require_nothing_there", look_and_let_the_other_prepare)
        with pytest.raises(KafkaError, match="exists already"):
            await prepare(b.run)
        before, log = await traces(theirs), await log_of(theirs)
        with pytest.raises(SourceError, match=f"not made by this migration; slot {ours.slot} may be theirs"):
            await prepare(b.run)
    with pytest.raises(SourceError, match="another target"):
        await clean(ours, prune=False, note=print)
    assert (await traces(theirs), await log_of(theirs)) == (before, log)


async def test_topics_of_another_source_on_the_same_broker_are_left(
    make_settings: MakeSettings,  # noqa: F811
    another: Another,
) -> None:
    ours, theirs = make_settings(), await another(other_source=True)
    async with bench(ours) as b, bench(theirs) as a:
        await prepare(a.run)
        log = await log_of(theirs)
        for _ in range(2):
            with pytest.raises(KafkaError, match="exists already"):
                await prepare(b.run)
        await b.target("insert into _live_migration.steps (name) values ('prepare')")  # as one that looked earlier
        with pytest.raises(KafkaError, match="belong to another migration"):
            await prepare(b.run)
    said: list[str] = []
    await clean(ours, prune=False, note=said.append)
    assert any("left topics" in line for line in said)
    assert await log_of(theirs) == log
    assert OWNER in await read_control(theirs)


async def test_a_clean_that_failed_half_way_is_no_danger_to_the_next_migration_of_the_name(
    make_settings: MakeSettings,  # noqa: F811
    another: Another,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = make_settings(), await another()
    await fetch(old.source_uri(), "create table t (id int primary key)")
    async with bench(old) as b:
        await prepare(b.run)

    async def fail(*_: object) -> None:
        raise LiveMigrationError("the target is away")

    with monkeypatch.context() as patch:
        patch.setattr(cleaning, "_clean_target", fail)
        with pytest.raises(LiveMigrationError, match="is away"):
            await clean(old, prune=False, note=print)
    async with bench(new) as a:
        await prepare(a.run)
    before, log = await traces(new), await log_of(new)
    with pytest.raises(SourceError, match="not made by this migration"):
        await clean(old, prune=False, note=print)
    async with bench(old) as b:
        with pytest.raises(SourceError, match="not made by this migration"):
            await begin_recopy(b.run)
        assert b.run.phase is Phase.SCHEMA
    assert (await traces(new), await log_of(new)) == (before, log)
    assert not log.is_ended
    await clean(new, prune=False, note=print)
    await clean(old, prune=False, note=print)
    assert await traces(old) == []


async def test_the_state_of_an_older_version_names_no_publications(
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    settings = make_settings()
    forget = "delete from _live_migration.source_changes where kind = 'publication'"
    async with bench(settings) as b:
        await prepare(b.run)
        await b.target(f"{forget}; update _live_migration.steps set is_done = false")
        await b.target("update _live_migration.migration set phase = 'prepare'")
    with pytest.raises(SourceError, match="not made by this migration"):
        await clean(settings, prune=False, note=print)  # it may have taken the step for begun, and found them
    await fetch(settings.target_uri(), "update _live_migration.steps set is_done = true")
    await clean(settings, prune=False, note=print)
    assert await traces(settings) == []


async def test_a_slot_alone_is_not_ours_before_all_was_made(make_settings: MakeSettings) -> None:  # noqa: F811
    settings = make_settings()
    async with bench(settings) as b:
        await b.target("insert into _live_migration.steps (name) values ('prepare')")
        await b.source("select pg_create_logical_replication_slot($1, 'pgoutput')", settings.slot)
        with pytest.raises(SlotError, match="was not made by this migration"):
            await prepare(b.run)
        assert [name for name, _ in await traces(settings)] == [settings.slot]


async def test_a_crash_between_a_publication_and_its_record_is_mended(
    make_settings: MakeSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The record is there first: what breaks off in between leaves no publication, and the next attempt makes both."""
    settings, record = make_settings(), preparing.record_publication

    async def record_and_fail(*arguments: Any) -> None:
        await record(*arguments)
        monkeypatch.setattr(preparing, "record_publication", record)
        await watcher.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name like $1 and datname = current_database()", "live-migration prepare%")  # fmt: skip

    watcher = await asyncpg.connect(settings.source_uri())
    async with bench(settings) as b:
        monkeypatch.setattr(preparing, "record_publication", record_and_fail)
        with pytest.raises(LiveMigrationError):
            await prepare(b.run)
        assert await traces(settings) == []
        await prepare(b.run)
        assert len(await traces(settings)) == 3
    await watcher.close()
    await clean(settings, prune=False, note=print)


# what a superseded coordinator gives up


async def test_a_slot_that_exists_already_outlives_who_could_not_make_it(
    source_database: str, unique_name: str
) -> None:
    await fetch(source_database, "select pg_create_logical_replication_slot($1, 'pgoutput')", unique_name)
    with pytest.raises(SourceError, match="already exists"):
        await create_slot(source_database, unique_name, timeout=10, on_wait=print)
    query = "select count(*)::int from pg_replication_slots where slot_name = $1"
    assert await fetch(source_database, query, unique_name) == [(1,)]


@pytest.mark.parametrize("is_replaced", [True, False])
async def test_who_gives_a_slot_up_drops_the_one_that_it_made(
    is_replaced: bool, source_database: str, unique_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = slot._watch_creation

    async def watch_and_be_stopped(*arguments: Any) -> None:
        await watch(*arguments)
        if is_replaced:
            await fetch(source_database, "select pg_drop_replication_slot($1)", unique_name)
            await fetch(source_database, "select pg_create_logical_replication_slot($1, 'pgoutput')", unique_name)
        raise asyncio.CancelledError

    monkeypatch.setattr(slot, "_watch_creation", watch_and_be_stopped)
    with pytest.raises(asyncio.CancelledError):
        await create_slot(source_database, unique_name, timeout=10, on_wait=print)
    query = "select count(*)::int from pg_replication_slots where slot_name = $1"
    assert await fetch(source_database, query, unique_name) == [(int(is_replaced),)]


async def test_a_superseded_coordinator_gives_up_nothing_of_its_successors(
    make_settings: MakeSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings()

    async def wait_while_another_takes_over(*_: object, **__: object) -> None:
        await fetch(settings.target_uri(), "update _live_migration.migration set epoch = epoch + 1")
        await fetch(settings.source_uri(), "select pg_create_logical_replication_slot($1, 'pgoutput')", settings.slot)
        raise SlotTimeout("waited in vain")

    async with bench(settings) as b:
        monkeypatch.setattr(preparing, "create_slot", wait_while_another_takes_over)
        with pytest.raises(Fenced):
            await prepare(b.run)
        assert len(await traces(settings)) == 3


# what is not known, and what is in use


async def test_clean_without_a_state_names_what_may_have_been_changed(
    make_settings: MakeSettings,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = make_settings(replica_identity_full=True)
    await fetch(settings.source_uri(), "create table t (id int)")
    async with bench(settings) as b:
        await prepare(b.run)
    await fetch(settings.target_uri(), "drop schema _live_migration cascade")  # as with the whole database
    await clean_up(settings, prune=False, force=True)
    said = capsys.readouterr().err
    assert "REPLICA IDENTITY FULL of public.t" in said
    assert "nothing of this migration is left" not in said
    await fetch(settings.source_uri(), "alter table t replica identity default")
    await clean_up(settings, prune=False)
    assert "nothing of this migration is left" in capsys.readouterr().err


async def test_clean_without_a_state_takes_nothing_that_may_be_anothers_without_a_word(
    make_settings: MakeSettings,  # noqa: F811
    another: Another,
) -> None:
    """Its own state lies on another target, and nobody reads its slot just now."""
    ours, theirs = make_settings(), await another()
    async with bench(theirs) as a:
        await prepare(a.run)
        migration_id = str(a.run.migration.id)
    before, log = await traces(theirs), await log_of(theirs)
    with pytest.raises(TargetError, match=f"whose these are is not known: slot {ours.slot}, publication") as refused:
        await clean(ours, prune=False, note=print)
    assert f"migration {migration_id}, into {describe(theirs.target_uri())}" in refused.value.message
    assert "--force" in refused.value.hint
    assert (await traces(theirs), await log_of(theirs)) == (before, log)
    said: list[str] = []
    await clean(ours, prune=False, note=said.append, force=True)
    assert await traces(theirs) == []
    assert f"deleted topic {ours.changes_topic}" in said
    await clean(ours, prune=False, note=print)  # nothing is left that would want a word


async def test_clean_without_a_state_leaves_topics_of_another_source(
    make_settings: MakeSettings,  # noqa: F811
    another: Another,
) -> None:
    ours, theirs = make_settings(), await another(other_source=True)
    async with bench(theirs) as a:
        await prepare(a.run)
    log = await log_of(theirs)
    said: list[str] = []
    for force in (False, True):
        await clean(ours, prune=False, note=said.append, force=force)
        assert said.pop().startswith("left topics")
        assert await log_of(theirs) == log


@pytest.mark.parametrize("is_done", [True, False])
async def test_clean_goes_without_a_source_that_is_off_where_somebody_says_so(
    make_settings: MakeSettings,  # noqa: F811
    is_done: bool,
) -> None:
    settings = make_settings(replica_identity_full=True)
    off = settings.model_copy(update={"source": SecretStr("postgresql://127.0.0.1:1/gone")})
    await fetch(settings.source_uri(), "create table t (id int)")
    async with bench(settings) as b:
        await prepare(b.run)
        if is_done:
            await b.target("update _live_migration.migration set phase = 'done'")
            for step in ("analyze", "jobs"):
                await steps.finish(b.run.target, b.run.epoch, step)
    with pytest.raises(ConnectionLost, match="cannot reach the source") as refused:
        await clean(off, prune=False, note=print)
    assert "clean --force" in refused.value.hint
    said: list[str] = []
    assert not await clean(off, prune=False, note=said.append, force=True)
    assert said[0].startswith("the source was left as it is")
    for left in (f"slot {settings.slot}", settings.insert_publication, "REPLICA IDENTITY FULL of public.t"):
        assert left in said[0]
    assert "dropped schema _live_migration on the target" in said
    assert f"deleted topic {settings.changes_topic}" in said
    assert len(await traces(settings)) == 3
    await clean(settings, prune=False, note=print, force=True)
    assert await traces(settings) == []


async def test_a_source_that_is_read_only_by_default_is_changed_and_given_back(
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    """So its writers are stopped, ours not: the setting stands in the state as on a source with TimescaleDB, which it needs none to give back."""
    settings = make_settings(replica_identity_full=True)
    database = settings.source_uri().rsplit("/", 1)[1]
    await fetch(settings.source_uri(), "create table t (id int)")
    await fetch(settings.source_uri(), f"alter database {database} set {AUTO_PUBLICATION} = on")
    await fetch(settings.source_uri(), f"alter database {database} set default_transaction_read_only = on")
    async with bench(settings) as b:
        await prepare(b.run)
        await b.target(
            f"insert into _live_migration.source_changes (kind, object, before, after) values ('database_setting', '{AUTO_PUBLICATION}', '', 'on')"
        )
        async with b.run.source_session("test") as source:
            await renew_decoding_catalog(source, settings.publication)
    said: list[str] = []
    assert await clean(settings, prune=False, note=said.append)
    assert "public.t has its replica identity back" in said
    assert f"{AUTO_PUBLICATION} of the source's database is as it was" in said
    left = "select unnest(setconfig) from pg_db_role_setting s join pg_database d on d.oid = s.setdatabase where d.datname = current_database()"
    assert await fetch(settings.source_uri(), left) == [("default_transaction_read_only=on",)]


async def test_clean_goes_without_a_source_whose_database_was_dropped(make_settings: MakeSettings) -> None:  # noqa: F811
    """A slip in SOURCE is no sign of that: slot and publications would stay on a source that lives."""
    settings = make_settings()
    head, _, name = settings.source_uri().rpartition("/")
    slip = settings.model_copy(update={"source": SecretStr(f"{settings.source_uri()}_slip")})
    async with bench(settings) as b:
        await prepare(b.run)
    for force in (False, True):
        with pytest.raises(SourceError, match="does not exist"):
            await clean(slip, prune=False, note=print, force=force)
    assert len(await traces(settings)) == 3
    await execute(f"{head}/postgres", f'alter database "{name}" rename to "{name}_gone"')
    try:
        with pytest.raises(SourceError, match="does not exist"):
            await clean(settings, prune=False, note=print)
        said: list[str] = []
        assert not await clean(settings, prune=False, note=said.append, force=True)
        assert said[0].startswith("the source was left as it is")
    finally:
        await execute(f"{head}/postgres", f'alter database "{name}_gone" rename to "{name}"')
    await clean(settings, prune=False, note=print, force=True)


async def test_clean_keeps_the_state_while_something_is_left_to_do_on_the_target(
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    settings = make_settings()
    async with bench(settings) as b:
        await prepare(b.run)
        await b.target("update _live_migration.migration set phase = 'done'")
        await steps.finish(b.run.target, b.run.epoch, "analyze")
    with pytest.raises(TargetError, match="foreign keys to be validated") as refused:
        await clean(settings, prune=False, note=print)
    assert "`live-migration migrate`" in refused.value.hint
    assert "ANALYZE" not in refused.value.message
    assert len(await traces(settings)) == 3
    said: list[str] = []
    await clean(settings, prune=False, note=said.append, force=True)
    assert "foreign keys to be validated" in said[0]
    assert "dropped schema _live_migration on the target" in said
    assert await traces(settings) == []


async def test_the_folder_of_a_broker_that_runs_is_left(
    make_settings: MakeSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings()
    folder = Path(settings.dir, "kafka")
    folder.mkdir(parents=True)
    monkeypatch.setattr(cleaning, "_LOCK_SECONDS", 0.2)
    said: list[str] = []
    with await lock_file(folder / "lock"):
        await clean(settings, prune=True, note=said.append)
        assert folder.exists()
        assert any(line.startswith(f"left {settings.dir}: a broker runs there") for line in said)
    await clean(settings, prune=True, note=said.append)
    assert not settings.dir.exists()


async def test_topics_are_signed_when_they_are_made(make_settings: MakeSettings) -> None:  # noqa: F811
    settings = make_settings()
    async with bench(settings) as b:
        await preparing.kafka.create_topics(settings)
        await sign_topics(settings, "another's")
        await b.target("insert into _live_migration.steps (name) values ('prepare')")
        with pytest.raises(KafkaError, match=r"another migration named .* \(another's\)"):
            await prepare(b.run)
