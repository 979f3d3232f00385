"""From commit on the source to visible on the target, under a steady load."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque

import asyncpg
import psutil

from benchmarks.backlog import Backlog, Contestant
from benchmarks.cases.case import Case
from benchmarks.cases.inserts import TABLE
from benchmarks.comparing import compare_rows
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Entry, Plan, Round
from benchmarks.sampling import Sampler
from benchmarks.servers import Servers, execute, running_servers, server_version

ABOUT = "steady 5,000 rows/s in transactions of 50: from commit to visible, every transaction a marker"
ROWS_PER_SECOND = 5_000
ROWS_PER_TRANSACTION = 50
SECONDS = 30.0
_LOOK_SECONDS = 0.005
_INSERT = """
    insert into public.metrics select i, now(), i % 100, i / 7.0 from generate_series($1::bigint, $2::bigint) i"""


async def run(plan: Plan) -> CaseResult:
    result = CaseResult("latency", ABOUT, [], has_ratio=False)
    contestants: list[Contestant] = [Ours(), Native(binary=True)]
    for contestant in contestants:
        async with running_servers(with_kafka=contestant.needs_kafka) as servers:
            result.entries.append(await _measure(plan, contestant, servers))
    return result


async def _measure(plan: Plan, contestant: Contestant, servers: Servers) -> Entry:
    entry = Entry(contestant.name, contestant.version(await server_version(servers.source_uri)))
    backlog = Backlog(tables=("public.metrics",), schema=TABLE, load=_no_load, applied=lambda number: "select true")
    await execute(servers.source_uri, TABLE)
    async with contestant.replicate(servers, backlog) as receiver:

        def kind_of(process: psutil.Process) -> str | None:
            return receiver.kind_of(process) or servers.kind_of(process)

        last = 0
        for number in range(plan.rounds + plan.warm_up):
            sampler = Sampler(kind_of)
            async with sampler:
                last, latencies, seconds = await _load_and_watch(servers, last, SECONDS * min(1.0, plan.scale))
            figures = _percentiles(latencies)
            print(f"  latency: {entry.contestant} p50 {figures['p50_ms']:.0f} ms, p99 {figures['p99_ms']:.0f} ms")
            if number >= plan.warm_up:
                rows = len(latencies) * ROWS_PER_TRANSACTION
                entry.rounds.append(Round(seconds, rows, sampler.usage, figures))
        await compare_rows(servers, backlog.tables, who=entry.contestant)
    return entry


async def _no_load(connection: asyncpg.Connection, number: int) -> int:
    return 0


async def _load_and_watch(servers: Servers, last: int, seconds: float) -> tuple[int, list[float], float]:
    """Write for so many seconds; give the last key, each transaction's latency in seconds, and how long it took."""
    waiting: deque[tuple[int, float]] = deque()
    latencies: list[float] = []
    began = time.monotonic()
    writing = asyncio.ensure_future(_write(servers.source_uri, last, seconds, waiting))
    target = await asyncpg.connect(servers.target_uri)
    try:
        statement = await target.prepare("select max(id) from public.metrics")
        while not writing.done() or waiting:
            asked_at = time.monotonic()
            visible = await statement.fetchval() or 0
            while waiting and waiting[0][0] <= visible:
                # a commit may be visible on the target before its answer has reached us
                latencies.append(max(0.0, asked_at - waiting.popleft()[1]))
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        await target.close()
    return await writing, latencies, time.monotonic() - began


async def _write(uri: str, last: int, seconds: float, waiting: deque[tuple[int, float]]) -> int:
    source = await asyncpg.connect(uri)
    try:
        began = time.monotonic()
        for number in range(round(seconds * ROWS_PER_SECOND / ROWS_PER_TRANSACTION)):
            await asyncio.sleep(max(0.0, began + number * ROWS_PER_TRANSACTION / ROWS_PER_SECOND - time.monotonic()))
            await source.execute(_INSERT, last + 1, last + ROWS_PER_TRANSACTION)
            last += ROWS_PER_TRANSACTION
            waiting.append((last, time.monotonic()))
        return last
    finally:
        await source.close()


def _percentiles(latencies: list[float]) -> dict[str, float]:
    hundredths = statistics.quantiles(latencies, n=100)
    return {"p50_ms": hundredths[49] * 1e3, "p99_ms": hundredths[98] * 1e3, "max_ms": max(latencies) * 1e3}


CASE = Case("latency", ABOUT, run)
