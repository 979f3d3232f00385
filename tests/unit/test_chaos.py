"""What a chaos round will do is decided by its seed alone."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.journal import append, passed_seeds, read, summary
from tests.chaos.plan import ALL_FAULTS, PHASES, Plan, make_plan
from tests.chaos.soak import Samples


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


def test_the_log_says_which_seeds_have_passed(tmp_path: Path) -> None:
    log = tmp_path / "rounds.jsonl"
    assert passed_seeds(log) == set()
    for seed, verdict in ((1, "ok"), (2, "failed"), (3, "ok")):
        faults = [
            {"fault": "cut", "phase": "copy", "what": "5"},
            {"fault": "cut", "phase": "copy", "what": "nobody there"},
        ]
        append(log, {"seed": seed, "verdict": verdict, "faults": faults, "commits": 9, "seconds": 2.0, "why": "rows"})
    assert passed_seeds(log) == {1, 3}
    told = summary(read(log))
    assert "3 rounds, 1 failed, 3 faults (at least 1 a round), 27 source transactions" in told
    assert "| cut | 3 |" in told
    assert "failed: seed 2" in told


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
    }
    assert told["lag_seconds"] == {"median": 0.6, "p99": 7.0, "max": 7.0}
