"""One hot table in several lanes beside one, on a target that answers each statement late."""

from __future__ import annotations

import asyncpg

from benchmarks.backlog import Backlog, measure_backlog
from benchmarks.cases.case import Case
from benchmarks.contestants.slowed import Slowed
from benchmarks.results import CaseResult, Plan

ABOUT = (
    "updates of one table, each answer of the target 20 ms late: 4 lanes of its own against one, one consumer and two"
)
LANES = 4
DELAY_SECONDS = 0.02
TRANSACTIONS, ROWS_PER_TRANSACTION = 400, 500
# Small batches, so that there are statements to be answered late.
_OPTIONS = {"partitions": "2", "batch_rows": "2000"}


async def run(plan: Plan) -> CaseResult:
    transactions = plan.scaled(TRANSACTIONS)

    async def load(connection: asyncpg.Connection, number: int) -> int:
        for part in range(transactions):
            first = (part % 20) * ROWS_PER_TRANSACTION + 1
            await connection.execute(
                "update hot set n = n + 1 where id between $1 and $2", first, first + ROWS_PER_TRANSACTION - 1
            )
        await connection.execute("update hot set round = $1 where id <= $2", number, 16 * LANES)
        return transactions * ROWS_PER_TRANSACTION

    backlog = Backlog(
        tables=("hot",),
        schema="create table hot (id int primary key, n int, round int)",
        initial=(f"insert into hot select i, 0, 0 from generate_series(1, {20 * ROWS_PER_TRANSACTION}) i",),
        load=load,
        # Rows of each lane, each in the last transaction.
        applied=lambda number: f"select bool_and(round = {number}) from hot where id <= {16 * LANES}",
    )
    split = {**_OPTIONS, "lanes": f"public.hot={LANES}"}
    contestants = [
        Slowed(1, DELAY_SECONDS, split, what=f"{LANES} lanes, "),
        Slowed(1, DELAY_SECONDS, _OPTIONS, what="1 lane, "),
        Slowed(2, DELAY_SECONDS, split, what=f"{LANES} lanes, "),
    ]
    return await measure_backlog("lanes_by_key", ABOUT, plan, backlog, contestants)


CASE = Case("lanes_by_key", ABOUT, run, aim=2.5)
