"""Half a million deleted rows in one transaction."""

from __future__ import annotations

import asyncpg

from benchmarks.backlog import Backlog, measure_backlog
from benchmarks.cases.case import Case
from benchmarks.cases.keyed import TABLE, all_rounds, filled
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan

ABOUT = "500,000 deleted rows in one transaction"


async def run(plan: Plan) -> CaseResult:
    count = plan.scaled(500_000, least=2)

    async def load(connection: asyncpg.Connection, number: int) -> int:
        delete, last = "delete from public.metrics where id between $1 and $2", number * count
        async with connection.transaction():
            await connection.execute(delete, last - count + 1, last - 1)
            await connection.execute(delete, last, last)
        return count

    backlog = Backlog(
        tables=("public.metrics",),
        schema=TABLE,
        initial=(filled((all_rounds(plan) + 1) * count),),
        load=load,
        applied=lambda number: f"select not exists (select from public.metrics where id = {number * count})",
    )
    peers = [Native(binary=True), Native(binary=True, streaming="parallel")]
    return await measure_backlog("deletes", ABOUT, plan, backlog, [Ours(), *peers])


CASE = Case("deletes", ABOUT, run, aim=1.8)
