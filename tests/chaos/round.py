"""One round: a migration under load and faults, then every row compared."""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from tests.chaos import checks
from tests.chaos.fault import Fault, Missed, Scene
from tests.chaos.fleet import Fleet
from tests.chaos.plan import PHASES, Plan, Step, draw
from tests.chaos.state import keep_state
from tests.chaos.straddles import BreakWithin
from tests.chaos.world import GONE, World
from tests.support.newcomer_load import NewcomerLoad
from tests.support.newcomers import NewcomerPlan, Straddle
from tests.support.workload import TABLES, Workload

_LEAVING_SECONDS = 10.0
_STUCK_SECONDS = 240.0
_DRAWS = 4
"""So many faults are tried until one hits something."""
_ORDER = (*PHASES, "done")


class RoundFailed(Exception):
    """Rows differ, the migration stands still, or something was left behind."""


@dataclass(slots=True)
class Happened:
    """A fault as it came."""

    at: float
    fault: str
    planned: str
    phase: str
    what: str
    seconds: float
    hit: bool
    """Whether it met somebody and healed; one that did not is none of the round's faults."""

    def __str__(self) -> str:
        planned = "" if self.planned == self.phase else f" (planned for {self.planned})"
        missed = "" if self.hit else "missed, "
        return f"{self.at:6.1f} s  {self.phase:8} {self.fault}: {missed}{self.what} [{self.seconds:.1f} s]{planned}"


@dataclass(slots=True)
class Outcome:
    """A round's result, one line of the log."""

    seed: int
    verdict: str = "failed"
    why: str = ""
    seconds: float = 0.0
    commits: int = 0
    faults: list[Happened] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    newcomers: dict[str, int] = field(default_factory=dict)
    """What happened to tables during replay, and how often."""
    phases: dict[str, float] = field(default_factory=dict)
    folder: str = ""
    revision: str = ""

    @property
    def hits(self) -> int:
        return sum(each.hit for each in self.faults)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Round:
    """Runs a plan in a world; `outcome` is filled as it goes."""

    def __init__(self, world: World, plan: Plan, folder: Path) -> None:
        self.world = world
        self.plan = plan
        self.folder = folder
        self.name = f"chaos_{plan.seed}"
        self.outcome = Outcome(plan.seed, plan=_summary(plan), folder=str(folder), revision=_revision())
        self._began = time.monotonic()
        self._phase = "start"
        self._watching: asyncio.Task[None] | None = None
        self._faults: set[asyncio.Task[None]] = set()
        self._tables = TABLES
        self._helpers: list[asyncio.Task[None]] = []

    async def run(self) -> Outcome:
        """Run it to its end; never raises but for a cancellation, or servers that do not come back."""
        self.folder.mkdir(parents=True)
        await self.world.drop_databases(self.name)
        await self.world.create_databases(self.name)
        try:
            await self._migrate()
            self.outcome.verdict = "ok"
        except RoundFailed as error:
            self.outcome.why = str(error)
            await keep_state(self.source, self.target, self.folder / "state")
        finally:
            self.outcome.seconds = round(time.monotonic() - self._began, 1)
        return self.outcome

    @property
    def source(self) -> str:
        return self.world.uri("source", self.name)

    @property
    def target(self) -> str:
        return self.world.uri("target", self.name)

    async def _migrate(self) -> None:
        plan = self.plan
        workload = Workload(
            self.source,
            plan.seed,
            connections=plan.writers,
            pause=plan.pause,
            reconnects=True,
            wild=True,
            unfollowed=plan.unfollowed,
            newcomer_share=plan.newcomers.share if plan.newcomers else 0.0,
        )
        await workload.create(rows=plan.rows)
        await self._prepare()
        fleet = Fleet(
            self._environment(),
            self.folder,
            own_workers=plan.own_workers,
            consumers=plan.consumers,
            has_clocks=plan.has_clocks,
        )
        self._set_latency(plan.latency)
        self._watching = asyncio.create_task(self._watch())
        try:
            async with fleet:
                scene = Scene(self.world, fleet, self.name, plan.lease)
                try:
                    async with workload:
                        async with self._making_newcomers(scene, workload):
                            await self._inject_until_cutover(scene)
                        await asyncio.sleep(0.5)
                    self.outcome.commits = workload.commits
                    restarts = scene.source_restarts
                    await self._cut_over(scene)
                finally:
                    await self._end_faults()
                    self.outcome.exits = fleet.exits
                if found := await self._compare(source_crashed_late=scene.source_restarts > restarts):
                    raise RoundFailed("; ".join(found))
                await self._verify_and_clean(fleet)
            if alarms := checks.alarms([*fleet.exits, *fleet.worker_errors()]):
                raise RoundFailed(f"a process calls changes lost: {'; '.join(alarms)}")
        except RoundFailed:
            raise
        except Exception as error:  # a statement of the workload that failed, first of all
            raise RoundFailed(f"{type(error).__name__}: {error}") from error
        finally:
            for task in (self._watching, *self._helpers):
                task.cancel()
            self._set_latency(0.0)

    async def _prepare(self) -> None:
        """Make on the source what the migration is to find beside the workload's tables."""

    @asynccontextmanager
    async def _making_newcomers(self, scene: Scene, workload: Workload) -> AsyncIterator[None]:
        """Let the plan's newcomers come from the beginning of replay on; at the end everything has happened to them."""
        if self.plan.newcomers is None:
            yield
            return
        load = NewcomerLoad(self.source, self.target, self.plan.newcomers, workload.newcomers)
        load.around_commit = lambda straddle: self._breaking_within(scene, straddle)
        self._helpers.append(asyncio.create_task(load.widen_target()))
        making = asyncio.create_task(self._make_newcomers(load))
        try:
            yield
            await making
            await self._join_faults()
        finally:
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)
            self.outcome.newcomers = dict(load.happened)
        self._tables = (*TABLES, *load.tables)

    async def _make_newcomers(self, load: NewcomerLoad) -> None:
        await self._until_phase("replay")
        await load.run()

    @asynccontextmanager
    async def _breaking_within(self, scene: Scene, straddle: Straddle) -> AsyncIterator[None]:
        fault = BreakWithin(random.Random(straddle.seed), straddle.rows)
        if not fault.is_drawn:
            yield
            return
        self._faults.add(asyncio.create_task(self._run_fault(scene, Step("replay", 0.0, fault, overlaps=True))))
        await fault.armed.wait()
        try:
            yield
        finally:
            fault.committed.set()

    async def _compare(self, *, source_crashed_late: bool) -> list[str]:
        return await checks.compare(
            self.source, self.target, source_crashed_late=source_crashed_late, tables=self._tables
        )

    def _set_latency(self, seconds: float) -> None:
        for side in ("source", "target"):
            self.world.proxies[side].latency = seconds

    def _environment(self) -> dict[str, str]:
        return {
            "SOURCE": self.world.proxied_uri("source", self.name),
            "TARGET": self.world.proxied_uri("target", self.name),
            "KAFKA": self.world.bootstrap,
            "LIVE_MIGRATION_NAME": self.name,
            "LIVE_MIGRATION_DIR": str(self.folder / "data"),
            "LIVE_MIGRATION_CONSUMERS": str(self.plan.consumers),
            "LIVE_MIGRATION_PARTITIONS": str(self.plan.partitions),
            "LIVE_MIGRATION_LANES": "\n".join(self.plan.lanes),
            "LIVE_MIGRATION_LEASE": str(self.plan.lease),
            **self.plan.options,
        }

    async def _inject_until_cutover(self, scene: Scene) -> None:
        for step in self.plan.steps:
            if step.phase != "cutover":
                await self._until_phase(step.phase)
                await self._inject(scene, step)
        await self._join_faults()
        await self._until_phase("replay")

    async def _cut_over(self, scene: Scene) -> None:
        """Ask for the cutover, again when it was refused, with the last faults beside."""
        injecting = asyncio.create_task(self._inject_at_cutover(scene))
        try:
            deadline = time.monotonic() + _STUCK_SECONDS
            while not scene.fleet.migrate.is_done:
                if self._phase != "done":
                    await scene.fleet.run("cutover", timeout=60)
                waited = time.monotonic()
                while not scene.fleet.migrate.is_done and time.monotonic() - waited < 20:
                    if time.monotonic() > deadline:
                        raise RoundFailed(
                            f"not done {_STUCK_SECONDS:g} s after the cutover was asked for; {await self._state_of()}"
                        )
                    await asyncio.sleep(0.1)
            await injecting
        finally:
            injecting.cancel()

    async def _inject_at_cutover(self, scene: Scene) -> None:
        for step in self.plan.steps:
            if step.phase == "cutover":
                await self._until_phase("cutover")
                await self._inject(scene, step)
        await self._join_faults()

    async def _inject(self, scene: Scene, step: Step) -> None:
        await asyncio.sleep(step.delay)
        task = asyncio.create_task(self._run_fault(scene, step))
        self._faults.add(task)
        if not step.overlaps:
            await self._join_faults()

    async def _run_fault(self, scene: Scene, step: Step) -> None:
        """Inject a step's fault, or one that is drawn for it where it hits nothing; what is drawn comes from the seed, too."""
        fault = step.fault
        for _ in range(_DRAWS):
            if await self._hits(scene, step, fault) or not self.plan.possible or self._phase == "done":
                return
            fault = draw(fault.rng, self.plan.possible)

    async def _hits(self, scene: Scene, step: Step, fault: Fault) -> bool:
        began, phase = time.monotonic(), self._phase
        scene.phase = phase
        what, hit = "did not end", False
        try:
            what, hit = await fault.inject(scene), True
        except Missed as missed:
            what = str(missed)
        finally:
            seconds = round(time.monotonic() - began, 1)
            at = round(began - self._began, 1)
            self.outcome.faults.append(Happened(at, fault.name, step.phase, phase, what, seconds, hit))
        return hit

    async def _join_faults(self) -> None:
        faults, self._faults = self._faults, set()
        await asyncio.gather(*faults)

    async def _end_faults(self) -> None:
        for task in self._faults:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*self._faults, return_exceptions=True)
        await self.world.heal()

    async def _watch(self) -> None:
        """Keep `_phase`; the target may be away at any time."""
        while True:
            try:
                connection = await asyncpg.connect(self.target, timeout=5)
                try:
                    while True:
                        await self._look(connection)
                        await asyncio.sleep(0.05)
                finally:
                    connection.terminate()
            except GONE:
                await asyncio.sleep(0.1)

    async def _look(self, connection: asyncpg.Connection) -> None:
        with suppress(asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            phase = await connection.fetchval("select phase from _live_migration.migration", timeout=5)
            if phase is not None and phase != self._phase:
                self._phase = phase
                if phase == "replay":
                    self._set_latency(0.0)
                self.outcome.phases[phase] = round(time.monotonic() - self._began, 1)

    async def _until_phase(self, phase: str) -> None:
        deadline = time.monotonic() + _STUCK_SECONDS
        while _ORDER.index(self._phase) < _ORDER.index(phase):
            if self._watching and self._watching.done():
                self._watching.result()
            if time.monotonic() > deadline:
                raise RoundFailed(f"phase {phase} not reached within {_STUCK_SECONDS:g} s: {await self._state_of()}")
            await asyncio.sleep(0.03)

    async def _state_of(self) -> str:
        """Say what the state on the target says of troubles."""
        try:
            connection = await asyncpg.connect(self.target, timeout=5)
            try:
                rows = await connection.fetch(
                    """select format('table %s.%s %s: %s', schema_name, table_name, state, error) from _live_migration.tables
                           where state <> 'ready' or error is not null
                       union all select format('lane %s: %s', lane, error) from _live_migration.checkpoints where error is not null
                       union all select format('event %s', message) from
                           (select message from _live_migration.events order by id desc limit 5) e"""
                )
                return f"phase {self._phase}; " + "; ".join(row[0] for row in rows)
            finally:
                connection.terminate()
        except GONE as error:
            return f"phase {self._phase}; no state to be read: {error}"

    async def _verify_and_clean(self, fleet: Fleet) -> None:
        if self.plan.verifies:
            code, out = await fleet.run("verify", timeout=90)
            if code != 0:
                raise RoundFailed(f"verify says {code}: {out}")
        code, out = await fleet.run("clean", timeout=90)
        if code != 0:
            raise RoundFailed(f"clean says {code}: {out}")
        deadline = time.monotonic() + _LEAVING_SECONDS  # else what the producer makes of it is not seen
        while not fleet.has_ended("producer") and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        for uri in (self.source, self.target):
            if left := await self._traces(uri):
                raise RoundFailed(f"clean left {left}")

    async def _traces(self, uri: str) -> list[str]:
        """Give what is left of the migration; a consumer that is just leaving, and has looked once more, is no trace."""
        deadline = time.monotonic() + _LEAVING_SECONDS
        while (left := await checks.traces(uri, self.name)) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        return left


def _revision() -> str:
    """Give the commit that runs, so that a seed can be repeated: another set of faults makes another plan of it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()


def _summary(plan: Plan) -> dict[str, Any]:
    return {
        "rows": plan.rows,
        "workers": f"{'own' if plan.own_workers else 'separate'}, {plan.consumers} consumers",
        "partitions": plan.partitions,
        "lanes": " ".join(plan.lanes),
        "lease": plan.lease,
        "latency": plan.latency,
        "options": plan.options,
        "verify": plan.verifies,
        "clocks": plan.has_clocks,
        "unfollowed": plan.unfollowed,
        **({"newcomers": _newcomers(plan.newcomers)} if plan.newcomers else {}),
    }


def _newcomers(plan: NewcomerPlan) -> list[str]:
    """Say of each newcomer what it is and what becomes of it, and which tables are taken out."""
    return [
        *(f"{each.name}: {each.kind}, {'straddled, ' if each.straddle else ''}{each.fate}" for each in plan.newcomers),
        *(f"{each.table}: taken out" for each in plan.taken_out),
    ]
