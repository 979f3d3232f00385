"""What happens in a round, decided by its seed before it begins."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.fault import Fault
from tests.chaos.faults import FAULTS
from tests.chaos.fleet_faults import FLEET_FAULTS, ClockJump
from tests.chaos.server_faults import LATER_SERVER_FAULTS, SERVER_FAULTS
from tests.support.newcomers import NewcomerPlan, plan_newcomers
from tests.support.workload import lanes_by_key

ALL_FAULTS = (*FAULTS, *SERVER_FAULTS, *FLEET_FAULTS)
LATER_SEED = 100_000
"""From this seed on `LATER_FAULTS` are drawn, too; below it every seed draws what it drew when its rounds were logged."""
LATER_FAULTS = LATER_SERVER_FAULTS
NEWCOMER_SEED = 200_000
"""From this seed on tables are made during replay, and straddled; what a seed draws beside is what it would draw without."""
PHASES = ("start", "prepare", "schema", "copy", "replay", "cutover")
UNFOLLOWED_SHARE = 0.3
"""Share of the rounds that update and delete rows of a table without identity, which is copied again behind the last barrier."""
_SPREAD_SECONDS = {"start": 2.0, "prepare": 0.5, "schema": 0.5, "copy": 1.5, "replay": 2.5, "cutover": 0.7}
"""A fault comes within so many seconds after its phase began, or after the fault before it in the phase."""


@dataclass(frozen=True, slots=True)
class Step:
    phase: str
    delay: float
    fault: Fault
    overlaps: bool
    """Whether the next step does not wait until this fault has healed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A round: its data, its processes, its faults in order."""

    seed: int
    rows: int
    writers: int
    pause: float
    own_workers: bool
    consumers: int
    partitions: int
    lanes: tuple[str, ...]
    """Tables with several lanes, as `--lanes` has them."""
    lease: float
    latency: float
    """Seconds by which each piece of data to and from source and target is late before replay, so that the early phases last."""
    options: dict[str, str]
    verifies: bool
    has_clocks: bool
    """Whether the processes' clocks can jump."""
    unfollowed: float
    """Share of transactions that update or delete a row of a table without identity."""
    newcomers: NewcomerPlan | None
    """Tables that are made during replay, or taken out of our publications."""
    possible: tuple[type[Fault], ...]
    """Faults that a missed one is replaced from; none are: it is not replaced."""
    steps: tuple[Step, ...]


def draw(rng: random.Random, possible: Sequence[type[Fault]]) -> Fault:
    """Choose a fault by weight, and make it with choices of its own."""
    kind = rng.choices(possible, weights=[fault.weight for fault in possible])[0]
    return kind(random.Random(rng.getrandbits(64)))


def _unfollowed(seed: int) -> float:
    """Give the share of transactions; drawn apart, so that the rest of a seed's plan is what it was without."""
    rng = random.Random(f"unfollowed {seed}")
    return rng.choice((0.002, 0.02)) if rng.random() < UNFOLLOWED_SHARE else 0.0


def faults_of(seed: int) -> tuple[type[Fault], ...]:
    """Give the faults that a seed draws from."""
    return (*ALL_FAULTS, *LATER_FAULTS) if seed >= LATER_SEED else ALL_FAULTS


def make_plan(seed: int, faults: Sequence[type[Fault]] | None = None, *, brief: bool = False) -> Plan:
    """Decide about a round: at least seven faults, one for each phase at the least.

    Args:
        seed: decides about everything.
        faults: to choose from; by default those that the seed draws from.
        brief: seven faults and little data.
    """
    rng = random.Random(seed)
    faults = faults_of(seed) if faults is None else faults
    has_clocks = ClockJump in faults and rng.random() < 0.25
    possible = tuple(fault for fault in faults if has_clocks or fault is not ClockJump)
    phases = [
        *PHASES,
        "replay",
        *rng.choices(PHASES, weights=(1, 1, 1, 3, 4, 2), k=0 if brief else rng.randrange(0, 4)),
    ]
    steps = []
    for phase in sorted(phases, key=PHASES.index):
        fault = draw(rng, possible)
        steps.append(Step(phase, rng.random() * _SPREAD_SECONDS[phase], fault, rng.random() < 0.4))
    return Plan(
        seed=seed,
        rows=2_000 if brief else rng.choice((2_000, 10_000, 30_000)),
        writers=rng.choice((3, 6)),
        pause=rng.choice((0.02, 0.05)),
        own_workers=rng.random() < 0.5,
        consumers=rng.choice((1, 2, 2, 3)),
        partitions=(partitions := rng.choice((1, 2, 4, 8))),
        lanes=lanes_by_key(seed) if partitions > 1 else (),
        lease=3.0 if brief else rng.choice((3.0, 5.0)),
        latency=rng.choice((0.0, 0.003, 0.01)),
        options={
            "LIVE_MIGRATION_PART_SIZE": str(rng.choice((65_536, 524_288, 536_870_912))),
            "LIVE_MIGRATION_SEGMENT_BYTES": str(rng.choice((4_096, 131_072))),
            "LIVE_MIGRATION_BATCH_ROWS": str(rng.choice((200, 1_000, 100_000))),
            "LIVE_MIGRATION_FLUSH_INTERVAL": str(rng.choice((0.02, 0.2))),
        },
        verifies=rng.random() < 0.3,
        has_clocks=has_clocks,
        unfollowed=_unfollowed(seed),
        newcomers=plan_newcomers(seed) if seed >= NEWCOMER_SEED else None,
        possible=possible,
        steps=tuple(steps),
    )
