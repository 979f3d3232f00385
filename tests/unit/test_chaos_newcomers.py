"""What a chaos round makes on the source during replay is decided by its seed, and is what a newcomer may be."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any, cast

import asyncpg
import pytest

from tests.chaos import straddles
from tests.chaos.fault import Missed, Scene
from tests.chaos.plan import ALL_FAULTS, LATER_FAULTS, NEWCOMER_SEED, make_plan
from tests.chaos.round import Round
from tests.chaos.straddles import BreakWithin
from tests.support.newcomers import (
    OLD_TABLES,
    Newcomer,
    NewcomerGone,
    Piece,
    Straddle,
    newcomer_statement,
    plan_newcomers,
    write_piece,
)
from tests.support.workload import Workload

SEEDS = range(NEWCOMER_SEED, NEWCOMER_SEED + 300)
PLANS = [plan_newcomers(seed) for seed in SEEDS]
NEWCOMERS = [newcomer for plan in PLANS for newcomer in plan.newcomers]
STRADDLES = [
    *((each.name, each.straddle) for each in NEWCOMERS if each.straddle),
    *((each.table, each.straddle) for plan in PLANS for each in plan.taken_out),
]


def test_a_seed_repeats() -> None:
    assert plan_newcomers(NEWCOMER_SEED) == plan_newcomers(NEWCOMER_SEED)
    assert plan_newcomers(NEWCOMER_SEED) != plan_newcomers(NEWCOMER_SEED + 1)


def test_seeds_of_before_make_none_and_faults_are_drawn_without_regard_to_them() -> None:
    assert make_plan(NEWCOMER_SEED - 1).newcomers is None
    plan = make_plan(NEWCOMER_SEED)
    assert plan.newcomers == plan_newcomers(NEWCOMER_SEED)
    faults = [step.fault.name for step in make_plan(NEWCOMER_SEED, (*ALL_FAULTS, *LATER_FAULTS)).steps]
    assert [step.fault.name for step in plan.steps] == faults


def test_every_kind_and_fate_and_end_of_a_savepoint_comes_up() -> None:
    assert {each.kind for each in NEWCOMERS} == {"key", "nothing", "full", "partitioned"}
    assert {each.fate for each in NEWCOMERS} == {"stays", "truncated", "dropped", "made again", "widened"}
    pieces = [piece for _, straddle in STRADDLES for piece in (*straddle.before, *straddle.after)]
    assert {piece.undo for piece in pieces} == {"none", "released", "rolled back"}
    assert {piece.table for piece in pieces} > set(OLD_TABLES)
    assert {straddle.begins_first for _, straddle in STRADDLES} == {True, False}
    assert 30 < sum(bool(plan.taken_out) for plan in PLANS) < 150


def test_what_cannot_be_brought_is_gone_before_the_cutover() -> None:
    partitioned = [each for each in NEWCOMERS if each.kind == "partitioned"]
    assert {(each.fate, each.straddle) for each in partitioned} == {("dropped", None)}


def test_a_straddling_transaction_changes_its_table_and_others_before_and_after() -> None:
    for table, straddle in STRADDLES:
        for pieces in (straddle.before, straddle.after):
            tables = {piece.table for piece in pieces}
            assert table in tables
            assert tables & set(OLD_TABLES) - {table}
    assert sum(straddle.rows > 500 for _, straddle in STRADDLES) > len(STRADDLES) * 0.9


def test_rows_that_are_rolled_back_are_not_counted() -> None:
    pieces = [
        Piece("app.new_0", 1, 10 ** (n + 1), False, undo) for n, undo in enumerate(("none", "released", "rolled back"))
    ]
    assert Straddle(True, (pieces[0], pieces[2]), (pieces[1],), True, 1).rows == 110


def newcomer(kind: Any, name: str = "app.new_0") -> Newcomer:
    return Newcomer(name, kind, 0.0, 0, None, "stays", 0.0)


@pytest.mark.parametrize("kind", ["key", "nothing", "full", "partitioned"])
def test_what_makes_a_newcomer_may_run_twice(kind: Any) -> None:
    assert newcomer(kind).creation.startswith("drop table if exists app.new_0;")
    assert ("primary key" in newcomer(kind).creation) == (kind == "key")


class Told:
    """A session that keeps what it is told, and fails when it is to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.statements: list[str] = []
        self._error = error

    async def execute(self, statement: str, *_: object) -> None:
        self.statements.append(statement)
        if self._error:
            raise self._error

    async def copy_records_to_table(self, name: str, **_: object) -> None:
        self.statements.append(f"copy {name}")

    async def fetch(self, statement: str, *_: object) -> list[tuple[int]]:
        return [(1,)]

    def transaction(self) -> Any:
        async def tell(word: str) -> None:
            self.statements.append(word)

        return SimpleNamespace(
            start=lambda: tell("savepoint"), commit=lambda: tell("release"), rollback=lambda: tell("rollback")
        )


async def told_of(kind: str) -> str:
    session, rng = Told(), random.Random(1)
    for _ in range(300):
        await newcomer_statement(cast(Any, session), rng, [newcomer(kind)])
    return " ".join(session.statements)


async def test_a_table_that_is_published_with_inserts_alone_is_only_inserted_into() -> None:
    only_inserted = await told_of("nothing")
    assert "truncate" in only_inserted
    assert not {"update", "delete"} & set(only_inserted.split())
    for kind in ("key", "full"):
        assert {"update", "delete", "truncate", "insert"} <= set((await told_of(kind)).split())


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (asyncpg.UndefinedTableError("relation does not exist"), NewcomerGone),
        (asyncpg.InternalServerError("could not open relation with OID 1"), NewcomerGone),
        (asyncpg.InternalServerError("another one"), asyncpg.InternalServerError),
    ],
)
async def test_a_newcomer_that_is_being_dropped_is_told_from_a_failure(
    error: Exception, raised: type[Exception]
) -> None:
    with pytest.raises(raised):
        await newcomer_statement(cast(Any, Told(error)), random.Random(1), [newcomer("nothing")])


async def test_the_workload_draws_nothing_while_there_is_no_newcomer() -> None:
    async def statements(share: float, newcomers: list[Newcomer]) -> list[str]:
        workload, session, rng = Workload("", 1, newcomer_share=share), Told(), random.Random(5)
        workload.newcomers = newcomers
        for _ in range(60):
            await workload._statement(cast(Any, session), rng)
        return session.statements

    without = await statements(0.0, [])
    assert await statements(0.5, []) == without
    assert sum("app.new_0" in each for each in await statements(0.5, [newcomer("full")])) > 10


@pytest.mark.parametrize(
    ("undo", "is_copy", "told"),
    [
        ("none", False, ["insert"]),
        ("released", True, ["savepoint", "copy", "release"]),
        ("rolled back", False, ["savepoint", "insert", "rollback"]),
    ],
)
async def test_a_piece_is_written_in_its_savepoint(undo: Any, is_copy: bool, told: list[str]) -> None:
    session = Told()
    await write_piece(cast(Any, session), Piece("app.new_0", 1, 5, is_copy, undo))
    assert [each.split()[0] for each in session.statements] == told


class FakeProxy:
    def __init__(self, events: list[str]) -> None:
        self._events = events
        self.connection_count = 3

    def slow_down(self, speed: float) -> None:
        self._events.append("slow")

    def cut(self) -> None:
        self._events.append("cut")

    def heal(self) -> None:
        self._events.append("healed")


async def broken(monkeypatch: pytest.MonkeyPatch, *, commits: bool) -> list[str]:
    """Give what comes to pass around a transaction that a cut is to break."""
    events: list[str] = []
    world = SimpleNamespace(proxies={"source": FakeProxy(events)})
    fault = BreakWithin(random.Random(1), 500)
    fault.how, fault.seconds = "cut source", 0.0
    monkeypatch.setattr(straddles, "_COMMIT_SECONDS", 5.0 if commits else 0.0)
    readers = iter([0, 1])

    async def read(*_: object) -> int:
        events.append("looks who reads")
        return next(readers)

    monkeypatch.setattr(straddles, "_readers", read)
    injecting = asyncio.create_task(fault.inject(Scene(cast(Any, world), cast(Any, None), "x", 3.0)))
    await fault.armed.wait()
    events.append("commits" if commits else "is lost")
    if commits:
        fault.committed.set()
        await injecting
    else:
        with pytest.raises(Missed, match="did not commit"):
            await injecting
    return events


async def test_the_stream_is_slow_before_the_transaction_commits_and_breaks_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = ["looks who reads"] * 2
    assert await broken(monkeypatch, commits=True) == [*looks, "slow", "commits", "cut", "healed"]
    assert await broken(monkeypatch, commits=False) == [*looks, "slow", "is lost", "healed"]


def test_a_round_says_what_it_makes(tmp_path: Any) -> None:
    nowhere = cast(Any, None)
    with_newcomers = Round(nowhere, make_plan(NEWCOMER_SEED), tmp_path).outcome.plan["newcomers"]
    assert with_newcomers[0].startswith("app.new_0: ")
    assert "newcomers" not in Round(nowhere, make_plan(1), tmp_path).outcome.plan
