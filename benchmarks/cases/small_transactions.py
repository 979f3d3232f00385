"""Many transactions of one row each."""

from __future__ import annotations

import asyncpg

from benchmarks.backlog import Backlog, measure_backlog
from benchmarks.cases.case import Case
from benchmarks.cases.inserts import TABLE
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan

ABOUT = "100,000 transactions of one inserted row"
_LOADER = """
    create procedure load(first bigint, last bigint) language plpgsql as $$
    begin
        for i in first .. last loop
            insert into public.metrics values (i, timestamptz '2026-01-01' + i * interval '1 s', i % 100, i / 7.0);
            commit;
        end loop;
    end $$"""


async def run(plan: Plan) -> CaseResult:
    count = plan.scaled(100_000)

    async def load(connection: asyncpg.Connection, number: int) -> int:
        await connection.execute("set synchronous_commit = off")  # of the loading session alone
        await connection.execute(f"call load({1 + (number - 1) * count}, {number * count})")
        return count

    backlog = Backlog(
        tables=("public.metrics",),
        schema=TABLE,
        initial=(_LOADER,),
        load=load,
        applied=lambda number: f"select exists (select from public.metrics where id = {number * count})",
    )
    return await measure_backlog("small_transactions", ABOUT, plan, backlog, [Ours(), Native(binary=True)])


CASE = Case("small_transactions", ABOUT, run, aim=1.5)
