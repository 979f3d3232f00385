"""Changes that the target refuses: the exact one is named, others go on, it can be mended or skipped, and nothing else is."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from typing import Any

import asyncpg
import orjson
import pytest
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from live_migration.common import kafka, state
from live_migration.common.errors import TargetError
from live_migration.common.segment import Position
from live_migration.consumer import skips
from live_migration.consumer.apply_phase import run_apply_phase
from live_migration.consumer.skips import LaneSkips
from live_migration.coordinator.dead_letters import read_letters
from live_migration.coordinator.recopy import VOID
from live_migration.coordinator.skip import describe_skips, parse_position, read_skips, request_skip
from tests.support.lanes import Replay, describe, grow, make_table, replay
from tests.support.segments import INT4, TEXT, delete, insert, relation, truncate, update

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("live_migration.consumer.partition_task.STOPPED_SECONDS", 0.5)
    monkeypatch.setattr("live_migration.consumer.partition_task.BROKEN_LOG_SECONDS", 0.5)


async def refused_at(it: Replay, lane: int = 0, after: str = "", seconds: float = 40) -> dict[str, str]:
    """Wait until the lane stands at a change that it names, another one than `after`; give what the checkpoint says of it."""
    found: dict[str, str] = {}

    async def is_refused() -> bool:
        row = await it.checkpoint(lane)
        refused = orjson.loads(row["refused"] or "{}")
        if refused.get("position", after) == after:
            return False
        found.update(refused, error=row["error"], hint=row["hint"])
        return True

    await it.until(is_refused, seconds)
    return found


async def skip(it: Replay, refused: dict[str, str], lane: int = 0) -> None:
    await request_skip(it.settings, lane, parse_position(refused["position"]))


async def letters(it: Replay) -> list[dict[str, Any]]:
    return [json.loads(letter) async for letter in read_letters(it.settings)]


# each kind of refusal: what is done to the target, the change that is refused, and what is said


KINDS: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "unique": (
        "insert into t0 values (5000, 'by hand')",
        lambda: insert("t0", "5000", "mine"),
        "INSERT",
        r"key \(id=5000\): duplicate key .*SQLSTATE 23505",
    ),
    "check": ("alter table t0 add check (v <> 'bad')", lambda: insert("t0", "5000", "bad"), "INSERT", "SQLSTATE 23514"),
    "check of an update": (
        "alter table t0 add check (v <> 'bad')",
        lambda: update("t0", "18", "bad"),
        "UPDATE",
        r"key \(id=18\): .*SQLSTATE 23514",
    ),
    "length": (
        "create index on t0 (v)",
        lambda: insert("t0", "5000", "".join(sha256(bytes([n])).hexdigest() for n in range(200))),
        "INSERT",
        "index row .*SQLSTATE 54000",
    ),
    "range": ("select 1", lambda: insert("t0", "5000000000", "x"), "INSERT", r"id=5000000000.*SQLSTATE 22003"),
    "not null": ("alter table t0 alter v set not null", lambda: insert("t0", "5000", None), "INSERT", "SQLSTATE 23502"),
    "missing, update": ("select 1", lambda: update("t0", "5000", "x"), "UPDATE", r"key \(id=5000\): .*hits 0 rows"),
    "missing, key changed": (
        "select 1",
        lambda: update("t0", "5001", "x", key=("5000", None)),
        "UPDATE",
        r"key \(id=5000\): .*hits 0 rows",
    ),
    "missing, delete": ("select 1", lambda: delete("t0", "5000", None), "DELETE", r"key \(id=5000\): .*hits 0 rows"),
    "truncate": (
        "create table child (id int references other)",
        lambda: truncate("other"),
        "TRUNCATE",
        "SQLSTATE 0A000",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lane_count", [1, 2])
async def test_the_refused_change_is_named_and_skipped_alone(
    target_database: str, kafka_bootstrap: str, unique_name: str, kind: str, lane_count: int
) -> None:
    """In the midst of a transaction of two tables, in one segment or over many; all other changes arrive."""
    mischief, change, operation, said = KINDS[kind]
    seed = random.randrange(10_000)
    print(f"seed {seed}")
    rng = random.Random(seed)
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=lane_count) as it:
        lane = it.lanes[0]
        await add_table(it, "other")
        await it.target.execute(mischief)
        lane.transaction([insert("t0", str(n), "old") for n in range(20)])
        lane.cut()
        others = [insert("t0", str(n), "new") for n in range(100, 200)] + [update("t0", str(n), "x") for n in range(10)]
        others += [insert("other", str(n), "o") for n in range(50)]
        rng.shuffle(others)
        where = rng.randrange(len(others))
        expected = Position(lane.next_lsn, where + 1)
        later = [update("t0", str(n), "y") for n in range(5, 15)] + [delete("t0", "19", None)]
        lane.transaction([*others[:where], change(), *others[where:], *later], cut_after=rng.choice((0, 7, 40)))
        lane.cut()
        await it.send()
        async with it.consumer():
            refused = await refused_at(it)
            assert (refused["position"], refused["kind"]) == (str(expected), operation)
            relation_name = "public.other" if operation == "TRUNCATE" else "public.t0"
            place = f"{it.settings.changes_topic}-0-"
            assert refused["error"].startswith(
                f"{relation_name}: the target refuses the {operation} at {expected} in {place}"
            )
            assert re.search(said, refused["error"]), refused["error"]
            assert "the lane then goes on by itself" in refused["hint"]
            assert refused["hint"].endswith(f"live-migration skip --lane 0 --position '{expected}'")
            await skip(it, refused)
            await it.until_applied()
        rows = dict.fromkeys(range(20), "old") | dict.fromkeys(range(100, 200), "new") | dict.fromkeys(range(10), "x")
        rows |= dict.fromkeys(range(5, 15), "y")
        del rows[19]
        if kind == "unique":
            rows[5000] = "by hand"
        assert await it.rows(0) == rows
        assert await it.target.fetchval("select count(*) from other") == 50
        (letter,) = await letters(it)
        assert (letter["position"], letter["table"], letter["op"]) == (str(expected), relation_name, operation.lower())
        assert letter["migration"] == it.migration_id
        assert letter["reason"] == refused["reason"]
        assert letter["topic"] + f"-0-{letter['offset']}," in refused["error"].replace(": ", ", ", 2)
        (done,) = await read_skips(it.target)
        assert (done.state, done.position, done.relation) == ("skipped", str(expected), relation_name)
        assert (await it.checkpoint(0))["error"] is None


async def add_table(it: Replay, name: str, lane: int = 0) -> None:
    await make_table(it.target, lane, name)
    describe(it.lanes[lane], name)


@pytest.mark.parametrize(
    ("alter", "said", "mend"),
    [
        ("drop column v", "the source's table public.t0 has columns that the target's lacks: v", 'ADD COLUMN "v" text'),
        (
            "alter v type integer using null::integer",
            "column v of public.t0 is text on the source and integer on the target",
            'ALTER COLUMN "v" TYPE text',
        ),
        (
            "drop column v, add column v text generated always as (id::text) stored",
            "column v of public.t0 is generated on the target only",
            'ALTER COLUMN "v" DROP EXPRESSION',
        ),
    ],
)
async def test_a_refused_shape_can_be_mended_or_skipped_change_by_change(
    target_database: str, kafka_bootstrap: str, unique_name: str, alter: str, said: str, mend: str
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        lane = it.lanes[0]
        await add_table(it, "other")
        await it.target.execute(f"alter table t0 {alter}")
        first = Position(lane.next_lsn, 2)
        lane.transaction(
            [insert("other", "1", "o"), insert("t0", "7", "seven"), insert("other", "2", "o"), insert("t0", "8", "x")]
        )
        lane.cut()
        lane.transaction([insert("other", "3", "o"), insert("t0", "9", "nine")])
        lane.cut()
        await it.send()
        async with it.consumer():
            refused = await refused_at(it)
            assert refused["position"] == str(first)
            assert f"key (id=7): {said}" in refused["error"]
            assert mend in refused["hint"]
            assert "the lane then goes on by itself" in refused["hint"]
            assert f"skip --lane 0 --position '{first}'" in refused["hint"]
            await skip(it, refused)
            second = await refused_at(it, after=refused["position"])
            assert second["position"] == str(Position(first.commit_lsn, 4))
            await skip(it, second)
            third = await refused_at(it, after=second["position"])
            assert len(await it.target.fetch("select from other")) == 2
            await it.target.execute(f"alter table t0 {mend}")
            await it.until_applied()
        assert await it.rows(0) == {9: "nine"}
        assert len(await it.target.fetch("select from other")) == 3
        assert [letter["new"] for letter in await letters(it)] == [{"id": "7", "v": "seven"}, {"id": "8", "v": "x"}]
        assert third["position"] not in [each.position for each in await read_skips(it.target)]


async def test_rows_of_fixed_size_are_named_and_skipped_out_of_their_run(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """Binary rows without text, which are not taken apart one by one: two of them are refused, at their own positions."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        lane = it.lanes[0]
        await add_table(it, "fixed")
        lane.describe("fixed", relation("fixed", [("id", INT4, True), ("v", INT4, False)]))
        await it.target.execute(
            "alter table fixed alter v type integer using null; insert into fixed values (70, 0), (71, 0)"
        )
        lsn = lane.next_lsn
        lane.transaction([insert("fixed", n, n) for n in range(50)])
        lane.transaction([insert("fixed", n, n) for n in range(50, 150)])
        lane.cut()
        await it.send()
        async with it.consumer():
            first = await refused_at(it)
            await skip(it, first)
            second = await refused_at(it, after=first["position"])
            await skip(it, second)
            await it.until_applied()
        places = [str(Position(lsn + 0x100, n)) for n in (21, 22)]
        assert [first["position"], second["position"]] == places
        rows = {row["id"]: row["v"] for row in await it.target.fetch("select * from fixed")}
        assert rows == {n: n for n in range(150)} | {70: 0, 71: 0}
        assert [(letter["position"], letter["new"]) for letter in await letters(it)] == [
            (places[0], {"id": "70", "v": "70"}),
            (places[1], {"id": "71", "v": "71"}),
        ]


async def test_a_mended_target_goes_on_by_itself_and_others_never_wait(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it, it.consumer():
        await it.target.execute("insert into t0 values (5, 'in the way')")
        expected: list[dict[int, str]] = [{}, {}]
        grow(it.lanes[0], expected[0], range(3, 8))
        await it.send()
        refused = await refused_at(it)
        for start in (0, 10, 20):
            grow(it.lanes[1], expected[1], range(start, start + 5))
            await it.send()

            async def has_all() -> bool:
                return await it.rows(1) == expected[1]

            await it.until(has_all)
        assert (await it.checkpoint(0))["refused"]
        await it.target.execute("delete from t0")
        await it.until_applied()
        assert await it.rows(0) == expected[0]
        assert await letters(it) == []
        with pytest.raises(TargetError, match="lane 0 is not stopped"):
            await skip(it, refused)


async def test_only_the_exact_position_of_a_stopped_lane_can_be_skipped(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        await it.target.execute("insert into t0 values (5, 'in the way')")
        grow(it.lanes[0], {}, range(3, 8))
        await it.send()
        async with it.consumer():
            refused = await refused_at(it)
        position = parse_position(refused["position"])
        for wrong in (
            Position(position.commit_lsn, position.ordinal + 1),
            Position(position.commit_lsn + 1, position.ordinal),
        ):
            with pytest.raises(
                TargetError, match=f"does not stand at {wrong} but at {position}, the INSERT of public.t0"
            ):
                await request_skip(it.settings, 0, wrong)
        with pytest.raises(TargetError, match="no lane 2") as none:
            await request_skip(it.settings, 2, position)
        assert none.value.hint == "Its lanes are 0 to 1."
        with pytest.raises(TargetError, match="lane 1 is not stopped"):
            await request_skip(it.settings, 1, position)
        assert await read_skips(it.target) == ()
        assert "will skip the INSERT" in await request_skip(it.settings, 0, position)
        assert "already" in await request_skip(it.settings, 0, position)
        (waiting,) = await read_skips(it.target)
        assert waiting.state == "requested"
        # the target is mended before the lane comes to it: what was asked for holds, for the user said so
        async with it.consumer("worker-2"):
            await it.until_applied()
        assert sorted(await it.rows(0)) == [3, 4, 5, 6, 7]
        assert [each.state for each in await read_skips(it.target)] == ["skipped"]


async def test_changes_of_a_skipped_row_are_refused_by_their_own_positions(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        lane = it.lanes[0]
        await it.target.execute("alter table t0 add check (v not like 'bad%')")
        lsn = lane.next_lsn
        lane.transaction([insert("t0", "1", "good"), insert("t0", "2", "bad"), update("t0", "2", "bad still")])
        lane.cut()
        await it.send()  # by itself: what comes later could make good what is refused, in one batch with it
        lane.transaction([update("t0", "1", "better"), update("t0", "2", "well"), delete("t0", "2", None)])
        lane.cut()
        lane.transaction([insert("t0", "2", "anew")])
        lane.cut()
        found: list[dict[str, str]] = []
        async with it.consumer():
            for number in range(4):
                found.append(await refused_at(it, after=found[-1]["position"] if found else ""))
                if not number:
                    await it.send()
                await skip(it, found[-1])
            await it.until_applied()
        places = [Position(lsn, 2), Position(lsn, 3), Position(lsn + 0x100, 2), Position(lsn + 0x100, 3)]
        assert [each["position"] for each in found] == list(map(str, places))
        assert "hits 0 rows" in found[1]["error"]
        assert await it.rows(0) == {1: "better", 2: "anew"}
        assert [letter["position"] for letter in await letters(it)] == list(map(str, places))
        lines = describe_skips(await read_skips(it.target))
        assert lines[0].startswith("4 changes skipped on request, which the target lacks: public.t0 4;")
        assert len(lines) == 5


@pytest.mark.parametrize("form", ["text", "binary"])
async def test_a_letter_holds_a_big_row_whole_and_the_error_is_short(
    target_database: str, kafka_bootstrap: str, unique_name: str, form: str
) -> None:
    """With what JSON and UTF-8 make hard, over the borders of pieces and slices; from a message that came in fragments."""
    big = ('ü"\\\n\t\x01😀' + "x" * 1017) * 4000
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        await it.target.execute("alter table t0 add check (length(v) < 1000)")
        lane = it.lanes[0]
        row = (str(1), big) if form == "text" else (1, big.encode())
        lane.transaction([insert("t0", *row)])
        lane.cut(fragment_bytes=500_000)
        lane.transaction([insert("t0", *("2", "small") if form == "text" else (2, b"small"))])
        lane.cut()
        await it.send()
        async with it.consumer():
            refused = await refused_at(it)
            assert len(refused["error"]) < 1500
            assert "key (id=1):" in refused["error"]
            await skip(it, refused)
            await it.until_applied()
        assert await it.rows(0) == {2: "small"}
        (letter,) = await letters(it)
        assert letter["new"] == {"id": "1", "v": big}


async def test_a_huge_key_is_cut_in_the_error(target_database: str, kafka_bootstrap: str, unique_name: str) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        lane = it.lanes[0]
        lane.describe("t0", relation("t0", [("id", INT4, True), ("v", TEXT, True)], identity="f"))
        await it.target.execute("alter table t0 drop constraint t0_pkey, add check (v not like 'z%')")
        lane.transaction([insert("t0", "1", "z" * 100_000)])
        lane.cut()
        await it.send()
        async with it.consumer():
            refused = await refused_at(it)
        assert f"(id=1, v={'z' * 60}… (100000 bytes))" in refused["error"]
        assert len(refused["error"]) < 1500


async def test_a_huge_value_that_the_server_repeats_is_cut_in_the_error(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        lane = it.lanes[0]
        lane.describe("t0", relation("t0", [("id", INT4, True), ("v", 99_999, False)]))
        await it.target.execute("create type mood as enum ('sad'); alter table t0 alter v type mood using v::mood")
        lane.transaction([insert("t0", "1", "z" * 100_000)])
        lane.cut()
        await it.send()
        async with it.consumer():
            refused = await refused_at(it)
        assert "SQLSTATE 22P02" in refused["error"]
        assert len(refused["error"]) < 1500


async def test_trouble_of_the_server_is_blamed_on_no_change(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """A full disk, say: whatever change it hits, to skip that one would help nobody."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        await it.target.execute("""
            create function full_disk() returns trigger language plpgsql as $$begin
                if new.id = 5 then raise exception 'no space left' using errcode = 'disk_full'; end if; return new; end$$;
            create trigger t before insert on t0 for each row execute function full_disk();
            alter table t0 enable always trigger t;
        """)
        expected: dict[int, str] = {}
        grow(it.lanes[0], expected, range(10))
        await it.send()
        async with it.consumer():

            async def is_told() -> bool:
                return "SQLSTATE 53100" in ((await it.checkpoint(0))["error"] or "")

            await it.until(is_told)
            row = await it.checkpoint(0)
            assert row["refused"] is None
            assert "live-migration skip" not in row["hint"]
            with pytest.raises(TargetError, match="at nothing that could be skipped"):
                await request_skip(it.settings, 0, Position(0x1000, 6))
            await it.target.execute("drop trigger t on t0")
            await it.until_applied()
        assert await it.rows(0) == expected


# the letter and the checkpoint


@pytest.mark.parametrize("cut", ["before the letter", "after the letter", "at the commit"])
async def test_a_consumer_that_dies_around_the_letter_skips_once_and_never_without_it(
    target_database: str, kafka_bootstrap: str, unique_name: str, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """The consumer's sessions end, and it with them; another one, that knows nothing of it, goes on."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        expected: dict[int, str] = {}
        await it.target.execute("insert into t0 values (50, 'in the way')")
        lane = it.lanes[0]
        lane.transaction([insert("t0", str(n), "v") for n in range(100)], cut_after=30)
        lane.cut()
        expected.update(dict.fromkeys(range(100), "v") | {50: "in the way"})
        await it.send()
        async with it.consumer():
            refused = await refused_at(it)
        await skip(it, refused)
        reached = asyncio.Event()
        usual_send, usual_finish = skips.send_letter, LaneSkips.finish

        async def send_letter(*arguments: Any) -> None:
            if cut == "after the letter":
                await usual_send(*arguments)
            reached.set()
            await asyncio.Event().wait()

        async def finish(self: LaneSkips, connection: asyncpg.Connection, positions: list[Position]) -> None:
            await usual_finish(self, connection, positions)
            if positions:
                reached.set()
                await asyncio.Event().wait()

        with monkeypatch.context() as patch:
            if cut == "at the commit":
                patch.setattr(LaneSkips, "finish", finish)
            else:
                patch.setattr(skips, "send_letter", send_letter)
            dying = asyncio.ensure_future(run_apply_phase(it.settings, "dying", asyncio.Event()))
            await asyncio.wait_for(reached.wait(), 60)
            dying.cancel()
            with suppress(asyncio.CancelledError):
                await dying
        assert [each.state for each in await read_skips(it.target)] == ["requested"]
        assert 51 not in await it.rows(0)
        assert len(await letters(it)) == (0 if cut == "before the letter" else 1)
        async with it.consumer("heir"):
            await it.until_applied()
        assert await it.rows(0) == expected
        found = await letters(it)
        assert len(found) == (1 if cut == "before the letter" else 2)
        assert {(letter["position"], letter["new"]["id"]) for letter in found} == {(refused["position"], "50")}
        assert [each.state for each in await read_skips(it.target)] == ["skipped"]


async def test_attempts_that_fail_behind_a_letter_write_no_second_one(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """One source transaction over two segments, which is one target transaction: what is skipped in the first waits for the second."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=1) as it, it.consumer():
        await it.target.execute("insert into t0 values (5, 'hand'), (15, 'hand')")
        it.lanes[0].transaction([insert("t0", str(n), "v") for n in range(20)], cut_after=10)
        it.lanes[0].cut()
        await it.send()
        first = await refused_at(it)
        await skip(it, first)
        second = await refused_at(it, after=first["position"])
        epoch = (await it.checkpoint(0))["epoch"]

        async def is_tried_again() -> bool:
            return (await it.checkpoint(0))["epoch"] >= epoch + 4  # type: ignore[no-any-return]

        await it.until(is_tried_again)
        assert len(await letters(it)) == 1
        assert sorted(await it.rows(0)) == [5, 15]
        await skip(it, second)
        await it.until_applied()
        assert [letter["new"]["id"] for letter in await letters(it)] == ["5", "15"]
        assert await it.rows(0) == {n: "hand" if n in (5, 15) else "v" for n in range(20)}


async def test_without_a_place_for_letters_nothing_is_skipped(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it, it.consumer():
        await it.target.execute("insert into t0 values (50, 'in the way')")
        lane = it.lanes[0]
        lane.transaction([insert("t0", str(n), "v") for n in (49, 50, 51)])
        lane.cut()
        await it.send()
        refused = await refused_at(it)
        async with kafka.admin(it.settings) as client:
            await client.alter_configs(
                [ConfigResource(ConfigResourceType.TOPIC, it.settings.dead_letter_topic, {"retention.ms": "86400000"})]
            )
        await skip(it, refused)

        async def is_told() -> bool:
            return "retention.ms=86400000, it must be -1" in ((await it.checkpoint(0))["error"] or "")

        await it.until(is_told)
        assert await it.rows(0) == {50: "in the way"}
        async with kafka.admin(it.settings) as client:
            await client.alter_configs(
                [ConfigResource(ConfigResourceType.TOPIC, it.settings.dead_letter_topic, kafka.CHANGES_CONFIG)]
            )
        await it.until_applied(60)
        assert await it.rows(0) == {49: "v", 50: "in the way", 51: "v"}
        assert len(await letters(it)) == 1


async def test_tables_that_are_copied_again_lack_no_row_that_was_skipped(target_database: str) -> None:
    connection = await asyncpg.connect(target_database)
    await state.create_schema(connection)
    await connection.execute("""
        insert into _live_migration.checkpoints (lane, commit_lsn, ordinal, error, refused) values (0, '0/900', 3, 'stopped', '{}');
        insert into _live_migration.skips (lane, commit_lsn, ordinal, relation, kind, reason, skipped_at)
        values (0, '0/800', 1, 'public.t', 'INSERT', 'said', now()), (0, '0/1000', 1, 'public.t', 'INSERT', 'said', null);
    """)
    assert [each.state for each in await read_skips(connection)] == ["skipped", "requested"]
    await connection.execute(VOID)
    assert await read_skips(connection) == ()
    assert await connection.fetchval("select refused is null from _live_migration.checkpoints")
    await connection.close()


# random


@pytest.mark.parametrize("seed", range(4))
async def test_random_poison_is_found_in_its_order_and_all_else_arrives(
    target_database: str, kafka_bootstrap: str, unique_name: str, seed: int
) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    options = {"batch_rows": rng.choice((20, 100_000))}
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=rng.choice((1, 3)), **options) as it:
        lane = it.lanes[0]
        kind = rng.choice(("integer", "numeric"))  # folded, and in source order
        if kind == "numeric":
            await it.target.execute("alter table t0 alter id type numeric")
            lane.describe("t0", relation("t0", [("id", 1700, True), ("v", TEXT, False)]))
        await it.target.execute(
            "alter table t0 add check (v <> 'bad'); insert into t0 select n, 'hand' from generate_series(9000, 9099) n"
        )
        rows = dict.fromkeys(range(9000, 9100), "hand")
        refused: list[Position] = []
        fresh = iter(range(1_000_000))
        poisoned = iter(rng.sample(range(9000, 9100), 100))
        for _ in range(12):
            changes: list[bytes] = []
            for number in range(1, rng.randrange(2, 80)):
                position = Position(lane.next_lsn, number)
                mine = [key for key in rows if key < 9000]
                dice = rng.random()
                if dice < 0.02:
                    refused.append(position)
                    bad = rng.randrange(3)
                    changes.append(
                        insert("t0", str(next(poisoned)), "x")
                        if bad == 0
                        else insert("t0", str(20_000 + next(fresh)), "bad")
                        if bad == 1
                        else delete("t0", str(20_000 + next(fresh)), None)
                    )
                elif dice < 0.5 or not mine:
                    key = next(fresh)
                    rows[key] = f"v{number}"
                    changes.append(insert("t0", str(key), rows[key]))
                elif dice < 0.8:
                    key = rng.choice(mine)
                    rows[key] = f"u{number}"
                    changes.append(update("t0", str(key), rows[key]))
                else:
                    key = rng.choice(mine)
                    del rows[key]
                    changes.append(delete("t0", str(key), None))
            lane.transaction(changes, cut_after=rng.choice((0, 0, 5, 17)))
            if rng.random() < 0.6:
                lane.cut()
        lane.cut()
        await it.send()
        async with it.consumer():
            last = ""
            for position in refused:
                found = await refused_at(it, after=last)
                assert found["position"] == str(position)
                last = found["position"]
                await skip(it, found)
            await it.until_applied(60)
        assert {int(key): value for key, value in (await it.rows(0)).items()} == rows
        assert [letter["position"] for letter in await letters(it)] == list(map(str, refused))
