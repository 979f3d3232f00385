"""Cases of one form: changes wait on the source while the receiver stands still, then it is let go until all are applied."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

import asyncpg
import psutil

from benchmarks.comparing import compare_rows
from benchmarks.results import CaseResult, Entry, Plan, Round
from benchmarks.sampling import Sampler
from benchmarks.servers import Servers, execute, running_servers, server_version

_POLL_SECONDS = 0.02
_LONGEST_SECONDS = 3600.0


@dataclass(frozen=True)
class Backlog:
    """What is to be replayed.

    schema: DDL, run on the source; a peer that does not carry the schema gets it on the target too.
    initial: statements that fill the tables before replication begins.
    load: makes the changes of a round (from 1) on the source and gives how many there are.
    applied: a cheap query, true on the target when all changes of that round are there.
    """

    tables: tuple[str, ...]
    schema: str
    load: Callable[[asyncpg.Connection, int], Awaitable[int]]
    applied: Callable[[int], str]
    initial: tuple[str, ...] = ()


class Receiver(Protocol):
    """A replication that is set up and has caught up."""

    async def hold(self) -> None:
        """Stand still: what the source commits from now on waits."""

    async def arm(self) -> None:
        """Get ready, once the changes are committed."""

    async def go(self) -> float:
        """Go on; give the time from which it counts."""

    async def until_done(self, applied: str) -> float:
        """Wait until all is where the case wants it; give the time."""

    async def settle(self, applied: str) -> None:
        """Wait until everything is on the target."""

    def kind_of(self, process: psutil.Process) -> str | None:
        """Name the kind of its own processes."""


class Contestant(Protocol):
    """Who takes part."""

    name: str
    needs_kafka: bool

    def version(self, server: str) -> str:
        """Name program and version, given the server's version."""

    def replicate(self, servers: Servers, backlog: Backlog) -> AbstractAsyncContextManager[Receiver]:
        """Set up a replication of the source's tables, which exist and are filled, and wait until it has caught up."""


async def measure_backlog(
    name: str, about: str, plan: Plan, backlog: Backlog, contestants: Sequence[Contestant]
) -> CaseResult:
    """Run the rounds, the contestants in turn, each on servers of its own that the others leave idle; compare all rows."""
    result = CaseResult(name, about, [Entry(each.name) for each in contestants])
    async with AsyncExitStack() as stack:
        stands: list[tuple[Entry, Servers, Receiver]] = []
        for contestant, entry in zip(contestants, result.entries, strict=True):
            servers = await stack.enter_async_context(running_servers(with_kafka=contestant.needs_kafka))
            entry.version = contestant.version(await server_version(servers.source_uri))
            await execute(servers.source_uri, backlog.schema, *backlog.initial, "vacuum analyze")
            receiver = await stack.enter_async_context(contestant.replicate(servers, backlog))
            stands.append((entry, servers, receiver))
        for number in range(1, plan.rounds + plan.warm_up + 1):
            for entry, servers, receiver in stands if number % 2 else reversed(stands):
                measured = await _run_round(number, servers, receiver, backlog)
                is_counted = number > plan.warm_up
                print(f"  {name}: {entry.contestant} {measured.seconds:.2f} s{'' if is_counted else ' (warm-up)'}")
                if is_counted:
                    entry.rounds.append(measured)
        for entry, servers, _ in stands:
            await compare_rows(servers, backlog.tables, who=entry.contestant)
    return result


async def _run_round(number: int, servers: Servers, receiver: Receiver, backlog: Backlog) -> Round:
    def kind_of(process: psutil.Process) -> str | None:
        return receiver.kind_of(process) or servers.kind_of(process)

    applied = backlog.applied(number)
    await execute(servers.target_uri, "vacuum analyze")
    await receiver.hold()
    connection = await asyncpg.connect(servers.source_uri)
    try:
        changes = await backlog.load(connection, number)
    finally:
        await connection.close()
    await servers.checkpoint()
    await receiver.arm()
    sampler = Sampler(kind_of)
    async with sampler:
        began = await receiver.go()
        ended = await receiver.until_done(applied)
    await receiver.settle(applied)
    await execute(servers.source_uri, "vacuum analyze")
    return Round(ended - began, changes, sampler.usage)


async def until_true(
    uri: str, query: str, check: Callable[[], None] = lambda: None, *, poll_seconds: float = _POLL_SECONDS
) -> float:
    """Wait for a query that gives true, looking often and cheaply; give the time. `check` raises when there is no hope."""
    connection = await asyncpg.connect(uri)
    try:
        statement = await connection.prepare(query)
        async with asyncio.timeout(_LONGEST_SECONDS):
            while not await statement.fetchval():
                check()
                await asyncio.sleep(poll_seconds)
        return time.monotonic()
    finally:
        await connection.close()
