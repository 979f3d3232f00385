"""A short fixed set of chaos rounds; docs/reliability.md says how to run many more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.fleet_faults import ComeAndGo, Terminate
from tests.chaos.plan import make_plan
from tests.chaos.round import Round
from tests.chaos.server_faults import EndSessions, LockSource, LockTarget, NoConnections, ReadOnly
from tests.chaos.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

POSSIBLE = (*FAULTS, ComeAndGo, Terminate, EndSessions, LockSource, LockTarget, NoConnections, ReadOnly)
"""Those that need neither root nor libfaketime."""


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World() as world:
        yield world


async def test_every_row_is_there_once_whatever_broke(world: World, tmp_path: Path) -> None:
    for seed in (1, 200_000):
        outcome = await Round(world, make_plan(seed, POSSIBLE, brief=True), tmp_path / str(seed)).run()
        told = "\n".join(map(str, outcome.faults))
        print(f"seed {seed}: {outcome.seconds} s\n{told}")
        assert outcome.verdict == "ok", f"seed {seed}: {outcome.why}\n{told}\nlogs: {outcome.folder}"
        assert outcome.hits >= 6  # the last of seven may find the migration done
        assert outcome.commits > 50
