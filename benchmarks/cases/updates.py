"""Half a million updated rows in one transaction."""

from __future__ import annotations

import asyncpg

from benchmarks.backlog import Backlog, measure_backlog
from benchmarks.cases.case import Case
from benchmarks.cases.keyed import TABLE, filled
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan

ABOUT = "500,000 updated rows in one transaction"


async def run(plan: Plan) -> CaseResult:
    count = plan.scaled(500_000, least=2)

    async def load(connection: asyncpg.Connection, number: int) -> int:
        update = "update public.metrics set value = value + 1, round = $1 where id between $2 and $3"
        async with connection.transaction():
            await connection.execute(update, number, 1, count - 1)
            await connection.execute(update, number, count, count)
        return count

    backlog = Backlog(
        tables=("public.metrics",),
        schema=TABLE,
        initial=(filled(count),),
        load=load,
        applied=lambda number: f"select round = {number} from public.metrics where id = {count}",
    )
    peers = [Native(binary=True), Native(binary=True, streaming="parallel")]
    return await measure_backlog("updates", ABOUT, plan, backlog, [Ours(), *peers])


CASE = Case("updates", ABOUT, run, aim=1.8)
