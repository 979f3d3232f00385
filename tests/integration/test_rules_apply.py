"""Rules of replay, each broken on purpose where it can be: what is fenced, aborted, in source order or none of our business."""

from __future__ import annotations

import asyncio
import copy
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from live_migration.common import pgoutput, postgres, state
from live_migration.common.errors import Fenced, KafkaError, LaneStopped
from live_migration.common.kafka import admin, check_topics, delete_topics, topic_exists
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.segment import Position
from live_migration.consumer import checkpoint as checkpoints
from live_migration.consumer.apply_phase import run_apply_phase
from live_migration.consumer.checkpoint import Advance, Checkpoint
from live_migration.consumer.target_tables import TargetTables
from tests.fixtures.fix_postgres import HAS_STANDBY, NO_STANDBY
from tests.integration.test_applier import Pair
from tests.support.lanes import grow, replay
from tests.support.wal import read_messages

pytestmark = pytest.mark.integration


@pytest.fixture
async def pair(source_database: str, target_database: str, unique_name: str) -> Pair:
    return Pair(source_database, target_database, unique_name)


async def in_one_batch(pair: Pair) -> None:
    await pair.replay(binary=False, most_changes=1000, segments_per_batch=1000)


# checkpoints


async def make_lane(connection: asyncpg.Connection) -> UUID:
    """Make the state of a migration in phase replay with one lane; give its log's topic id."""
    topic_id = uuid4()
    await state.create_schema(connection)
    await connection.execute(
        """insert into _live_migration.migration (id, name, phase, settings, kafka, source_address, source_system,
               source_timeline, source_database, source_version, topic_id, lane_count)
           values ($1, 'test', 'replay', '{}', '', '', '', 1, '', 180000, $1, 1)""",
        topic_id,
    )
    await connection.execute("insert into _live_migration.checkpoints (lane) values (0)")
    return topic_id


@pytest.mark.parametrize("change", ["topic_id = gen_random_uuid()", "phase = 'copy'", "phase = 'prepare'"])
async def test_a_lane_is_taken_only_while_its_change_log_is_applied(target_database: str, change: str) -> None:
    """A consumer that slept through `migrate --recopy` must not begin to apply the log that was given up."""
    connection = await asyncpg.connect(target_database)
    topic_id = await make_lane(connection)
    await checkpoints.acquire(connection, 0, "sleeper", topic_id)
    await connection.execute(f"update _live_migration.migration set {change}")
    with pytest.raises(Fenced, match="not applied"):
        await checkpoints.acquire(connection, 0, "sleeper", topic_id)
    await connection.close()


@pytest.mark.parametrize("stale", ["epoch", "offset"])
async def test_a_checkpoint_moves_only_for_its_owner_and_from_where_it_stands(target_database: str, stale: str) -> None:
    """An owner that was succeeded, and one that has lost its place, must not commit what they applied."""
    connection = await asyncpg.connect(target_database)
    async with postgres.session(target_database, "target") as owner:
        topic_id = await make_lane(connection)
        held = await checkpoints.acquire(owner, 0, "first", topic_id)
        to = Advance(7, Position(100, 1), None, 1, 10, None)
        reached = await checkpoints.advance(owner, held, to)
        assert reached == Checkpoint(0, held.epoch, 7, Position(100, 1))
        wrong = Checkpoint(0, held.epoch - 1, 7, reached.position) if stale == "epoch" else held
        async with postgres.session(target_database, "target") as zombie:
            with pytest.raises(Fenced, match="lane 0"):
                await checkpoints.advance(zombie, wrong, Advance(9, Position(200, 1), None, 1, 10, None))
        row = await connection.fetchrow("select next_offset, change_count from _live_migration.checkpoints")
        assert tuple(row) == (7, 1)
    await connection.close()


async def test_a_successor_raises_the_epoch_and_ends_the_backend_before_it(target_database: str) -> None:
    connection = await asyncpg.connect(target_database)
    topic_id = await make_lane(connection)
    first, second = await asyncpg.connect(target_database), await asyncpg.connect(target_database)
    before = await checkpoints.acquire(first, 0, "first", topic_id)
    after = await checkpoints.acquire(second, 0, "second", topic_id)
    assert after.epoch == before.epoch + 1
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.InterfaceError)):
        await first.fetchval("select 1")
    first.terminate()
    await second.close()
    await connection.close()


# the log


async def test_an_aborted_kafka_transaction_is_never_applied(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """What a producer left behind when it died: the same positions come again, with other cuts, in a transaction that counts."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=1) as it, it.consumer():
        expected: dict[int, str] = {}
        grow(it.lanes[0], expected, range(5))
        await it.send()
        await it.until_applied()
        phantom = copy.deepcopy(it.lanes[0])
        grow(phantom, {}, range(100, 103))
        await it.producer.begin_transaction()
        for lane, record in phantom.take():
            await it.producer.send_and_wait(it.settings.changes_topic, record, partition=lane)
        await it.producer.abort_transaction()
        grow(it.lanes[0], expected, range(200, 205), cut_after=3)
        await it.send()
        await it.until_applied()
        assert await it.rows(0) == expected
        checkpoint = await it.checkpoint(0)
        assert checkpoint["error"] is None
        assert checkpoint["change_count"] == 20


# the target's triggers


async def test_no_trigger_or_foreign_key_of_the_target_acts_on_what_is_applied(pair: Pair) -> None:
    """The source's have acted already, and their effects are in the stream; the other table may be behind, too."""
    await pair.prepare("create table t (id int primary key, v int, parent int)")
    target = await asyncpg.connect(pair.target_uri)
    await target.execute("""
        create table audit (op text);
        create table parent (id int primary key);
        alter table t add foreign key (parent) references parent;
        create function act() returns trigger language plpgsql as
            $$begin insert into public.audit values (tg_op); if tg_op <> 'DELETE' then new.v := -1; return new; end if; return old; end$$;
        create trigger act before insert or update or delete on t for each row execute function act();
    """)
    await pair.source.execute("insert into t values (1, 1, 7), (2, 2, 7), (3, 3, null)")
    await in_one_batch(pair)
    await pair.source.execute("update t set v = 20, parent = 8 where id = 2; delete from t where id = 3")
    await in_one_batch(pair)
    await pair.assert_equal(("t",))
    assert await target.fetchval("select count(*) from audit") == 0
    await target.close()
    await pair.close()


SWALLOWS = """
    create function public.swallow() returns trigger language plpgsql as 'begin return null; end';
    create trigger swallow before insert on public.t for each row when (new.id = 2) execute function public.swallow();
    alter table public.t enable always trigger swallow;
"""


async def test_what_a_transaction_sets_ends_with_it(pair: Pair) -> None:
    """Inserts, folded changes and changes in source order, each with settings of their own; `Pair.replay` looks at the session."""
    await pair.prepare(
        "create table t (id int primary key, v int); create table n (id numeric primary key, v int);"
        "create table e (v int); alter table e replica identity full"
    )
    for table in ("t", "n"):
        await pair.source.execute(f"insert into {table} select i, i from generate_series(1, 20) i")
        await pair.source.execute(f"update {table} set v = v + 1 where id < 9; delete from {table} where id > 15")
    await pair.source.execute("insert into e values (1), (1); delete from e where ctid = '(0,1)'")
    await pair.replay(binary=True, most_changes=10, segments_per_batch=3)
    await pair.assert_equal(("t", "n", "e"))
    await pair.close()


async def test_a_row_that_the_target_swallows_stops_the_lane(pair: Pair) -> None:
    await pair.prepare("create table t (id int primary key, v int)")
    target = await asyncpg.connect(pair.target_uri)
    await target.execute(SWALLOWS)
    await pair.source.execute("insert into t values (1, 1), (2, 2), (3, 3)")
    with pytest.raises(LaneStopped, match="COPY took 2 of 3 rows"):
        await in_one_batch(pair)
    assert await target.fetch("select from t") == []
    await target.close()
    await pair.close()


@pytest.mark.parametrize("is_binary", [True, False])
async def test_a_column_that_the_binary_stream_cannot_carry_stops_the_lane(pair: Pair, is_binary: bool) -> None:
    """An oid of the source's in binary form is some other relation here, or none; as text it is the relation's name."""
    await pair.prepare("create table other (id int primary key); create table t (id int primary key, v int)")
    target = await asyncpg.connect(pair.target_uri)
    await target.execute(
        """insert into _live_migration.migration (id, name, phase, settings, kafka, source_address, source_system,
               source_timeline, source_database, source_version, topic_id, lane_count, binary_stream)
           values (gen_random_uuid(), 'test', 'replay', '{}', '', '', '', 1, '', 180000, gen_random_uuid(), 1, $1)""",
        is_binary,
    )
    await pair.source.execute("insert into t values (1, 1)")
    await pair.replay(binary=is_binary, most_changes=1000, segments_per_batch=1000)
    for side in (pair.source, target):
        await side.execute("alter table t add column r regclass, add column s regclass[]")
    await pair.source.execute("insert into t values (2, 2, 'other', '{other}')")
    replaying = pair.replay(binary=is_binary, most_changes=1000, segments_per_batch=1000)
    if is_binary:
        with pytest.raises(LaneStopped, match=r"binary form .*: r \(regclass\), s \(regclass\[\]\)"):
            await replaying
    else:
        await replaying
        await pair.assert_equal(("t",))
    await target.close()
    await pair.close()


# order


async def test_a_truncate_stands_between_what_came_before_and_after_it(pair: Pair) -> None:
    await pair.prepare("create table t (id int primary key, v int); create table u (id int primary key)")
    await pair.source.execute("""
        insert into t values (1, 1), (2, 2); insert into u values (1);
        truncate t;
        insert into t values (2, 20), (3, 30); insert into u values (2); update t set v = 21 where id = 2;
        truncate t, u;
        insert into t values (2, 200); insert into u values (1);
    """)
    await in_one_batch(pair)
    await pair.assert_equal(("t", "u"))
    assert await pair.source.fetchval("select v from t") == 200
    await pair.close()


async def test_rows_change_places_in_one_batch(pair: Pair) -> None:
    """Keys that are freed and taken again, also by other rows: what goes must be gone before what comes."""
    await pair.prepare("create table t (id int primary key, v text)")
    await pair.source.execute("insert into t select i, 'row ' || i from generate_series(1, 6) i")
    await in_one_batch(pair)
    await pair.source.execute("""
        update t set id = 100 where id = 1; update t set id = 1 where id = 2; update t set id = 2 where id = 100;
        delete from t where id = 3; insert into t values (3, 'anew');
        delete from t where id = 4; update t set id = 4, v = 'moved' where id = 5;
    """)
    await in_one_batch(pair)
    await pair.assert_equal(("t",))
    await pair.close()


@pytest.mark.parametrize("constraint", ["unique (u)", "exclude using btree (u with =)"])
async def test_rows_swap_a_value_that_must_be_unique_through_a_third(pair: Pair, constraint: str) -> None:
    """The net effect alone would break the constraint half way: such a batch goes in source order."""
    await pair.prepare(f"create table t (id int primary key, u int, v int, {constraint})")
    await pair.source.execute("insert into t values (1, 1), (2, 2), (3, 3)")
    await in_one_batch(pair)
    await pair.source.execute("""
        update t set u = -1 where id = 1; update t set u = 1 where id = 2; update t set u = 2 where id = 1; update t set v = 9;
    """)
    await in_one_batch(pair)
    await pair.assert_equal(("t",))
    await pair.close()


# keys that are equal though their bytes are not

UNEQUAL_BYTES = """
    create extension citext;
    create table by_int (id int primary key, v int);
    create table by_text (id text primary key, v int);
    create table by_numeric (id numeric primary key, v int);
    create table by_float (id float8 primary key, v int);
    create table by_citext (id citext primary key, v int);
    create table by_both (id int, amount numeric, v int, primary key (id, amount));
"""


async def test_only_keys_whose_equality_is_that_of_their_bytes_are_folded(pair: Pair) -> None:
    await pair.prepare(UNEQUAL_BYTES)
    names = ("by_int", "by_text", "by_numeric", "by_float", "by_citext", "by_both")
    for name in names:
        await pair.source.execute(f"insert into {name} values (1, 1{', 1' if name == 'by_both' else ''})")
    messages = await read_messages(pair.source, pair.slot, pair.slot, binary=False)
    async with postgres.session(pair.target_uri, "target") as connection:
        tables = TargetTables(connection, 0)
        relations = [pgoutput.decode_relation(m) for m in messages if m[0] == pgoutput.RELATION]
        found = {str(r.name.name): (await tables.resolve(r)).table.is_foldable for r in relations}
    assert found == {
        "by_int": True,
        "by_text": True,
        "by_numeric": False,
        "by_float": False,
        "by_citext": False,
        "by_both": False,
    }
    await pair.close()


# source order

IN_SOURCE_ORDER = """
    create table t (id numeric primary key, v int, big text);
    alter table t alter big set storage external;
"""


async def test_source_order_keeps_what_an_update_left_out(pair: Pair) -> None:
    """A key that is not folded: changes one by one, with a TOASTed value that the stream does not repeat, and one set to null."""
    await pair.prepare(IN_SOURCE_ORDER)
    await pair.source.execute("insert into t values (1, 1, repeat('x', 9000)), (2, 2, repeat('y', 9000)), (3, 3, 'z')")
    await in_one_batch(pair)
    await pair.source.execute("""
        update t set v = v + 10 where id < 3; update t set v = null where id = 2; update t set big = null where id = 3;
        update t set id = 1.00 where id = 1; delete from t where id = 3; insert into t values (3.0, 33, 'anew');
    """)
    await in_one_batch(pair)
    await pair.assert_equal(("t",))
    assert await pair.source.fetchval("select length(big) from t where id = 2") == 9000
    await pair.close()


@pytest.mark.parametrize(
    ("change", "kind"), [("update t set v = 5 where id = 1", "U"), ("delete from t where id = 1", "D")]
)
async def test_source_order_stops_at_a_change_that_finds_no_row(pair: Pair, change: str, kind: str) -> None:
    await pair.prepare(IN_SOURCE_ORDER)
    await pair.source.execute("insert into t values (1, 1), (2, 2)")
    await in_one_batch(pair)
    target = await asyncpg.connect(pair.target_uri)
    await target.execute("delete from t where id = 1")
    await pair.source.execute(f"begin; update t set v = 7 where id = 2; {change}; commit")
    with pytest.raises(LaneStopped, match=rf"public\.t: .*#2: a change of kind {kind} hits 0 rows"):
        await in_one_batch(pair)
    await target.close()
    await pair.close()


# rows without a key


@pytest.mark.parametrize("most_changes", [1, 1000])
async def test_one_of_several_equal_rows_is_deleted(pair: Pair, most_changes: int) -> None:
    await pair.prepare("create table t (a int, b numeric); alter table t replica identity full")
    await pair.source.execute("insert into t select 1, 1.0 from generate_series(1, 5); insert into t values (1, 1.00)")
    await pair.replay(binary=False, most_changes=most_changes, segments_per_batch=1)
    await pair.source.execute("""
        delete from t where ctid = (select min(ctid) from t);
        delete from t where ctid = (select min(ctid) from t);
        update t set a = 2 where ctid = (select min(ctid) from t);
        delete from t where b::text = '1.00';
    """)
    await pair.replay(binary=False, most_changes=most_changes, segments_per_batch=1)
    await pair.assert_equal(("t",))
    assert await pair.source.fetchval("select count(*) from t") == 3
    await pair.close()


async def test_a_delete_of_a_row_without_key_that_is_not_there_stops_the_lane(pair: Pair) -> None:
    await pair.prepare("create table t (a int, b text); alter table t replica identity full")
    await pair.source.execute("insert into t values (1, 'x'), (1, 'x'), (2, 'y')")
    await in_one_batch(pair)
    target = await asyncpg.connect(pair.target_uri)
    await target.execute("delete from t where a = 1")
    await pair.source.execute("delete from t where a = 1")
    with pytest.raises(LaneStopped, match=r"public\.t: DELETE hits 0 rows where the source changed 2"):
        await in_one_batch(pair)
    await target.close()
    await pair.close()


async def test_what_the_copy_holds_is_passed_over_and_the_rest_is_applied(pair: Pair) -> None:
    """A table's copy is made between transactions that are in the stream, while one is open: the rule on real positions."""
    await pair.prepare("create table t (id int primary key, v int)")
    await pair.source.execute("insert into t values (1, 1)")
    open_one = await asyncpg.connect(pair.source_uri)
    await open_one.execute("begin; insert into t values (2, 2); update t set v = 10 where id = 1")
    rows = await pair.source.fetch("select id, v from t")
    snapshot, horizon = await pair.source.fetchrow(
        "select pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text"
    )
    await open_one.execute("commit")
    await pair.source.execute("insert into t values (3, 3); update t set v = v + 1 where id = 2")
    target = await asyncpg.connect(pair.target_uri)
    await target.executemany("insert into t values ($1, $2)", rows)
    await target.execute(
        "update _live_migration.tables set snapshot = $1, horizon = $2::text::pg_lsn where table_name = 't'",
        snapshot,
        horizon,
    )
    await in_one_batch(pair)
    await pair.assert_equal(("t",))
    await open_one.close()
    await target.close()
    await pair.close()


async def test_a_commit_that_the_copy_did_not_see_is_applied_although_it_stands_before_the_horizon(
    target_database: str, unique_name: str
) -> None:
    """A commit is in the WAL before it is visible, for long when it waits for a standby: positions alone do not tell."""
    async with LocalPostgres(settings=HAS_STANDBY) as server:
        pair = Pair(server.uri(), target_database, unique_name)
        await pair.prepare("create table t (id int primary key, v int)")
        hanging = await asyncpg.connect(server.uri())
        await hanging.execute("set synchronous_commit = on")
        committing = asyncio.ensure_future(hanging.execute("insert into t values (1, 1)"))
        waits = "select wait_event = 'SyncRep' from pg_stat_activity where pid = $1"
        async with asyncio.timeout(30):
            while not await pair.source.fetchval(waits, hanging.get_server_pid()):
                await asyncio.sleep(0.02)
        await pair.source.execute("insert into t values (2, 2)")
        snapshot, horizon = await pair.source.fetchrow(
            "select pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text"
        )
        rows = await pair.source.fetch("select id, v from t")
        assert [tuple(row) for row in rows] == [(2, 2)]
        for statement in NO_STANDBY:
            await pair.source.execute(statement)
        await committing
        async with postgres.session(target_database, "target") as target:
            await target.executemany("insert into public.t values ($1, $2)", rows)
            await target.execute(
                "update _live_migration.tables set snapshot = $1, horizon = $2::text::pg_lsn", snapshot, horizon
            )
        await in_one_batch(pair)
        await pair.assert_equal(("t",))
        await hanging.close()
        await pair.close()


async def test_a_topic_that_is_gone_is_told_and_not_made_anew_by_asking_for_it(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """A client that asks a broker for a topic makes it: empty, as if there were nothing to apply."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        await delete_topics(it.settings)
        async with admin(it.settings) as client, asyncio.timeout(30):
            while await topic_exists(client, it.settings.changes_topic):
                await asyncio.sleep(0.1)
            with pytest.raises(KafkaError, match="does not exist any more"):
                await run_apply_phase(it.settings, "worker-1", asyncio.Event())
            assert not await topic_exists(client, it.settings.changes_topic)


@pytest.mark.parametrize("wrong", [{"retention.ms": "60000"}, {"cleanup.policy": "compact"}])
async def test_a_topic_that_could_lose_changes_is_refused(
    target_database: str, kafka_bootstrap: str, unique_name: str, wrong: dict[str, str]
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        async with admin(it.settings) as client:
            await client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, it.settings.changes_topic, wrong)])

        async def checking() -> None:
            while True:  # the broker tells of it a moment later
                await check_topics(it.settings, 2)
                await asyncio.sleep(0.1)

        with pytest.raises(KafkaError, match=next(iter(wrong))):
            await asyncio.wait_for(checking(), 60)
