"""What a chaos round will do is decided by its seed alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.chaos.checks import alarms
from tests.chaos.fault import Fault, Missed, Scene
from tests.chaos.fleet import Fleet
from tests.chaos.journal import append, has_hit, passed_seeds, read, summary
from tests.chaos.plan import ALL_FAULTS, LATER_FAULTS, LATER_SEED, PHASES, Plan, Step, make_plan
from tests.chaos.round import Round
from tests.chaos.soak import Samples, disk_use


def told(plan: Plan) -> list[tuple[object, ...]]:
    return [(step.phase, step.delay, step.overlaps, step.fault.name, step.fault.rng.random()) for step in plan.steps]


def test_a_seed_repeats() -> None:
    assert told(make_plan(7)) == told(make_plan(7))
    assert told(make_plan(7)) != told(make_plan(8))


def test_every_round_has_a_fault_in_each_phase_and_seven_in_all() -> None:
    for seed in range(200):
        steps = make_plan(seed).steps
        assert len(steps) >= 7
        assert [phase for phase in PHASES if phase in {step.phase for step in steps}] == list(PHASES)


def test_every_fault_comes_up() -> None:
    seen = {type(step.fault) for seed in range(300) for step in make_plan(seed).steps}
    assert seen == set(ALL_FAULTS)
    later = {type(step.fault) for seed in range(LATER_SEED, LATER_SEED + 300) for step in make_plan(seed).steps}
    assert later == {*ALL_FAULTS, *LATER_FAULTS}


def test_a_seed_whose_rounds_are_logged_draws_what_it_drew() -> None:
    logged = "stop producer, stall, restart target, cut, target out of connections, stall, lock on source, stall, cut after bytes"
    assert ", ".join(step.fault.name for step in make_plan(92001).steps) == logged
    assert told(make_plan(LATER_SEED - 1)) == told(make_plan(LATER_SEED - 1, ALL_FAULTS))


def test_some_rounds_change_rows_that_no_stream_can_name() -> None:
    shares = [make_plan(seed).unfollowed for seed in range(100)]
    assert 10 < sum(share > 0 for share in shares) < 60


LOST = "error: replication slot x does not exist on the source: changes since its loss are lost\n  next: Run `live-migration migrate --recopy`: …"
HARMLESS = "WARNING the topics have 1 replica: changes that the source has let go of may be lost with a broker's disk | error: cannot reach the source"


def test_who_calls_changes_lost_raises_an_alarm() -> None:
    exits = [
        f"producer ended with code 1: {LOST}",
        "migrate ended with code 1: Traceback … SlotLost",
        "consumer-0 ended with code 1: Traceback … LogGap",
        "producer ended with code 1: error: topic x has 2 partitions |   next: Run `live-migration migrate --recopy`",
    ]
    assert alarms([*exits, f"migrate ended with code 1: {HARMLESS}"]) == exits


def test_errors_of_workers_that_we_did_not_start_are_seen(tmp_path: Path) -> None:
    fleet = Fleet({}, tmp_path, own_workers=True, consumers=1)
    assert fleet.worker_errors() == []
    logs = tmp_path / "data" / "logs"
    logs.mkdir(parents=True)
    (logs / "producer.log").write_text(f"streaming\n{LOST}\nstreaming\n")
    (logs / "consumer-1.log").write_text("a warning of an error: none\n")
    assert fleet.worker_errors() == [f"producer: {LOST.replace(chr(10), ' | ')}"]
    assert alarms(fleet.worker_errors()) == fleet.worker_errors()


class HitsNobody(Fault):
    name = "hits nobody"

    async def inject(self, scene: Scene) -> str:
        raise Missed("nobody there")


class HitsSomebody(Fault):
    name = "hits somebody"

    async def inject(self, scene: Scene) -> str:
        return "pid 1"


NOWHERE = cast(Any, None)


async def injected(possible: tuple[type[Fault], ...], folder: Path) -> Round:
    """Run a step whose fault hits nobody, where these may replace it."""
    fault = HitsNobody(random.Random(1))
    here = Round(NOWHERE, replace(make_plan(1), possible=possible), folder)
    await here._run_fault(Scene(NOWHERE, NOWHERE, "x", 3.0), Step("copy", 0.0, fault, overlaps=False))
    return here


async def test_another_fault_is_drawn_for_one_that_hit_nobody(tmp_path: Path) -> None:
    outcome = (await injected((HitsSomebody,), tmp_path)).outcome
    assert [(each.fault, each.hit) for each in outcome.faults] == [("hits nobody", False), ("hits somebody", True)]
    assert outcome.hits == 1
    assert "missed, nobody there" in str(outcome.faults[0])


@pytest.mark.parametrize(("possible", "tries"), [((), 1), ((HitsNobody,), 4)])
async def test_what_hits_nobody_counts_as_none(possible: tuple[type[Fault], ...], tries: int, tmp_path: Path) -> None:
    outcome = (await injected(possible, tmp_path)).outcome
    assert outcome.hits == 0
    assert len(outcome.faults) == tries


@pytest.mark.parametrize(
    "what",
    [
        "nobody there any more",
        "skipped: not root",
        "did not end",
        "source: 0 connections",
        "broker: 0 of 3",
        "pg_cancel_backend on source, 0 in 4 blows",
        "0 taken for 2.0 s",
        "app.by_key: InvalidSchemaNameError",
    ],
)
def test_older_lines_of_the_log_are_judged_by_their_words(what: str) -> None:
    assert not has_hit({"what": what})
    assert has_hit({"what": what, "hit": True})


@pytest.mark.parametrize("what", ["source: 10 connections", "broker: 1 of 3", "away for 0.9 s and its start", "pid 20"])
def test_older_lines_that_hit_something(what: str) -> None:
    assert has_hit({"what": what})
    assert not has_hit({"what": what, "hit": False})


def test_the_log_says_which_seeds_have_passed(tmp_path: Path) -> None:
    log = tmp_path / "rounds.jsonl"
    assert passed_seeds(log) == set()
    for seed, verdict in ((1, "ok"), (2, "failed"), (3, "ok")):
        faults = [
            {"fault": "cut", "phase": "copy", "what": "5"},
            {"fault": "cut", "phase": "copy", "what": "2 connections", "hit": False},
            {"fault": "cut", "phase": "copy", "what": "nobody there"},
        ]
        append(log, {"seed": seed, "verdict": verdict, "faults": faults, "commits": 9, "seconds": 2.0, "why": "rows"})
    assert passed_seeds(log) == {1, 3}
    told = summary(read(log))
    assert "3 rounds, 1 failed, 3 faults (at least 1 a round) and 6 that hit nothing, 27 source transactions" in told
    assert "| cut | 3 |" in told
    assert "failed: seed 2" in told
    assert "newcomers" not in told
    append(log, {**read(log)[0], "newcomers": {"straddled": 2, "dropped": 1}})
    append(log, {**read(log)[0], "newcomers": {"straddled": 3}})
    assert "newcomers: straddled 5, dropped 1" in summary(read(log))


def test_a_soak_tells_how_memory_went() -> None:
    samples = Samples()
    mebibyte = 2**20
    samples.memory["consumer", 1] = [(age, mebibyte * (50 if age < 200 else 60)) for age in range(0, 602, 2)]
    samples.memory["consumer", 2] = [(1.0, 40 * mebibyte), (3.0, 90 * mebibyte)]
    samples.lag_seconds += [0.5, 0.6, 7.0]
    told = samples.summary()
    assert told["memory_mib"]["consumer"] == {
        "processes": 2,
        "start": 45.0,
        "median": 60.0,
        "max": 90.0,
        "growth": ["50.0 to 60.0 in 10 min"],
        "each_5_min": [50.0, 60.0, 60.0],
    }
    assert told["lag_seconds"] == {"median": 0.6, "p99": 7.0, "max": 7.0}
    assert told["broker_disk_mib"] == {"max": 0.0, "each_5_min": []}


def test_a_soak_tells_how_much_the_broker_holds() -> None:
    samples = Samples()
    samples.broker_disk += [(age, 2**20 * (100 + age // 10 if age != 100 else 400)) for age in range(0, 701, 2)]
    told = samples.summary()["broker_disk_mib"]
    assert told == {"max": 400.0, "each_5_min": [100.0, 130.0, 160.0, 170.0]}


def test_disk_use_is_what_is_taken_of_the_disk(tmp_path: Path) -> None:
    before = disk_use(tmp_path)
    (tmp_path / "lane-0").mkdir()
    (tmp_path / "lane-0" / "0.log").write_bytes(b"x" * 2**20)
    with (tmp_path / "lane-0" / "0.index").open("wb") as holes:
        holes.truncate(10 * 2**20)  # as Kafka makes an index before there is anything in it
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert 2**20 <= disk_use(tmp_path) - before < 2 * 2**20
