"""Two consumers beside one, on a target that answers each statement late."""

from __future__ import annotations

import asyncpg

from benchmarks.backlog import Backlog, measure_backlog
from benchmarks.cases.case import Case
from benchmarks.contestants.slowed import Slowed
from benchmarks.results import CaseResult, Plan
from live_migration.common.lanes import lane_of
from live_migration.common.relation import QualifiedName

ABOUT = "updates of 8 tables in 8 lanes, each answer of the target 20 ms late: two consumers against one"
LANES = 8
DELAY_SECONDS = 0.02
TRANSACTIONS, ROWS_PER_TRANSACTION = 200, 500


async def run(plan: Plan) -> CaseResult:
    tables = _one_a_lane()
    transactions = plan.scaled(TRANSACTIONS)

    async def load(connection: asyncpg.Connection, number: int) -> int:
        for part in range(transactions):
            async with connection.transaction():
                for table in tables:
                    await connection.execute(
                        f"update {table} set n = n + 1 where id between $1 and $2",
                        (part % 20) * ROWS_PER_TRANSACTION + 1,
                        (part % 20 + 1) * ROWS_PER_TRANSACTION,
                    )
        for table in tables:
            await connection.execute(f"update {table} set round = $1 where id = 1", number)
        return transactions * ROWS_PER_TRANSACTION * len(tables)

    def applied(number: int) -> str:
        return "select " + " and ".join(f"(select round = {number} from {table} where id = 1)" for table in tables)

    backlog = Backlog(
        tables=tables,
        schema="; ".join(f"create table {table} (id int primary key, n int, round int)" for table in tables),
        initial=tuple(
            f"insert into {table} select i, 0, 0 from generate_series(1, {20 * ROWS_PER_TRANSACTION}) i"
            for table in tables
        ),
        load=load,
        applied=applied,
    )
    # Small batches, so that there are statements to be answered late.
    options = {"partitions": str(LANES), "batch_rows": "2000"}
    return await measure_backlog(
        "two_consumers", ABOUT, plan, backlog, [Slowed(consumers, DELAY_SECONDS, options) for consumers in (2, 1)]
    )


def _one_a_lane() -> tuple[str, ...]:
    found: dict[int, str] = {}
    number = 0
    while len(found) < LANES:
        found.setdefault(lane_of(QualifiedName("public", f"t{number}"), LANES), f"public.t{number}")
        number += 1
    return tuple(found.values())


CASE = Case("two_consumers", ABOUT, run, aim=1.8)
