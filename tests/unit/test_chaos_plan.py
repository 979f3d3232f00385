"""What a chaos round will do is decided by its seed alone."""

from __future__ import annotations

import json
from pathlib import Path

from tests.chaos.__main__ import passed_seeds
from tests.chaos.plan import ALL_FAULTS, PHASES, Plan, make_plan


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
    lines = [{"seed": 1, "verdict": "ok"}, {"seed": 2, "verdict": "failed"}, {"seed": 3, "verdict": "ok"}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert passed_seeds(log) == {1, 3}
