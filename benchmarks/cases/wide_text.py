"""Fifty columns, mostly text: rows inserted, then updated."""

from __future__ import annotations

import asyncpg

from benchmarks.backlog import Backlog, measure_backlog
from benchmarks.cases.case import Case
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan

ABOUT = "50 columns, mostly text, 200,000 rows inserted then updated, 10,000 a transaction"
TEXT_COLUMNS = 44
ROWS_PER_TRANSACTION = 10_000


async def run(plan: Plan) -> CaseResult:
    count = plan.scaled(200_000)
    texts = [f"t{number}" for number in range(1, TEXT_COLUMNS + 1)]
    columns = ", ".join(f"{text} text" for text in texts)
    values = ", ".join(f"'value {number} of row ' || i" for number in range(1, TEXT_COLUMNS + 1))
    insert = f"insert into public.wide select i, now(), i % 7, i / 3.0, i % 2 = 0, 0, {values} from generate_series($1::bigint, $2::bigint) i"
    update = "update public.wide set n = n + 1, round = 1, t1 = t1 || ' again' where id between $1 and $2"

    async def load(connection: asyncpg.Connection, number: int) -> int:
        first, last = 1 + (number - 1) * count, number * count
        for statement in (insert, update):
            for start in range(first, last + 1, ROWS_PER_TRANSACTION):
                await connection.execute(statement, start, min(start + ROWS_PER_TRANSACTION - 1, last))
        await connection.execute("update public.wide set round = 2 where id = $1", last)
        return 2 * count

    backlog = Backlog(
        tables=("public.wide",),
        schema=f"create table public.wide (id bigint primary key, at timestamptz, n int, v float8, b bool, round int, {columns})",
        load=load,
        applied=lambda number: f"select round = 2 from public.wide where id = {number * count}",
    )
    return await measure_backlog("wide_text", ABOUT, plan, backlog, [Ours(), Native(binary=True)])


CASE = Case("wide_text", ABOUT, run, aim=1.2)
