"""Which offset a lane may be deleted up to."""

from __future__ import annotations

import random

from live_migration.coordinator.trimming import Mark, TrimPlan


def feed(plan: TrimPlan, *marks: tuple[int, int]) -> list[int | None]:
    found = []
    for offset, byte_count in marks:
        plan.add(0, Mark(offset, byte_count))
        found.append(plan.due(0, byte_count))
    return found


def test_the_margin_stays() -> None:
    assert feed(TrimPlan(100, 10), (1, 0), (5, 50), (9, 99), (10, 100), (16, 160)) == [None, None, None, 1, 5]


def test_it_is_not_worth_it_below_a_step() -> None:
    plan = TrimPlan(0, 10)
    assert feed(plan, (4, 40)) == [4]
    plan.done(0, 4)
    assert feed(plan, (5, 45), (6, 49), (8, 50)) == [None, None, 8]


def test_what_was_refused_is_due_again() -> None:
    assert feed(TrimPlan(0, 1), (4, 40), (4, 40)) == [4, 4]


def test_lanes_are_apart() -> None:
    plan = TrimPlan(10, 1)
    plan.add(0, Mark(4, 40))
    plan.add(1, Mark(7, 70))
    assert (plan.due(0, 50), plan.due(1, 70), plan.due(2, 100)) == (4, None, None)


def test_a_checkpoint_that_was_moved_back_forgets_what_lay_beyond() -> None:
    assert feed(TrimPlan(10, 1), (4, 40), (8, 80), (6, 60), (6, 65), (7, 75)) == [None, 4, 4, 4, 6]
    assert feed(TrimPlan(10, 1), (4, 40), (2, 20), (3, 60)) == [None, None, 2]


def test_any_history_is_short_and_leaves_at_least_the_margin() -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    rng = random.Random(seed)
    plan = TrimPlan(640, 160)
    offset = byte_count = 0
    bytes_before: dict[int, int] = {}
    for _ in range(3000):
        offset += rng.randrange(3)
        byte_count += rng.randrange(60)
        bytes_before.setdefault(offset, byte_count)
        plan.add(0, Mark(offset, byte_count))
        if (due := plan.due(0, byte_count)) is not None:
            assert byte_count - bytes_before[due] >= 640 - 60
            assert byte_count - bytes_before[due] < 640 + 160 + 2 * 60
            plan.done(0, due)
        assert len(plan._marks[0]) <= 640 // 160 + 2
