"""REPLICA IDENTITY FULL without a key: each change has to find its row by all of it."""

from __future__ import annotations

import asyncpg

from benchmarks.backlog import Backlog, measure_backlog
from benchmarks.cases.case import Case
from benchmarks.cases.keyed import all_rounds
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan
from live_migration.common.lanes import lane_of
from live_migration.common.relation import QualifiedName

ABOUT = "REPLICA IDENTITY FULL without key: 1,000 updates and 1,000 deletes on a table of 300,000 rows"
LANES = 8
STATEMENTS = 20


async def run(plan: Plan) -> CaseResult:
    rows, changes = plan.scaled(300_000, least=10_000), plan.scaled(1_000, least=STATEMENTS)
    done = _beside("log", LANES)

    async def load(connection: asyncpg.Connection, number: int) -> int:
        """Change rows spread over the whole table, in small transactions of updates and deletes in turn."""
        step = rows // changes
        first = (number - 1) * 2
        for part in range(STATEMENTS):
            mine = f"n % {step} = {{}} and n / {step} % {STATEMENTS} = {part}"
            await connection.execute(f"update public.log set value = value + 1 where {mine.format(first)}")
            await connection.execute(f"delete from public.log where {mine.format(first + 1)}")
        await connection.execute(f"insert into public.{done} values ({number})")
        return 2 * changes

    assert rows // changes >= 2 * all_rounds(plan), "each round changes rows of its own"
    backlog = Backlog(
        tables=("public.log", f"public.{done}"),
        schema=f"""create table public.log (n int, at timestamptz, device int, value float8, note text);
            alter table public.log replica identity full;
            create table public.{done} (round int primary key)""",
        initial=(
            f"""insert into public.log select i, timestamptz '2026-01-01' + i * interval '1 s', i % 100, i / 7.0,
            'note ' || i % 10 from generate_series(0, {rows - 1}) i""",
        ),
        load=load,
        applied=lambda number: f"select exists (select from public.{done} where round = {number})",
    )
    return await measure_backlog("full_without_key", ABOUT, plan, backlog, [Ours(), Native(binary=True)])


def _beside(table: str, lanes: int) -> str:
    """Name a table that lies in the same lane: its row comes last, and is found without reading the other one whole."""
    wanted = lane_of(QualifiedName("public", table), lanes)
    names = (f"done_{number}" for number in range(1000))
    return next(name for name in names if lane_of(QualifiedName("public", name), lanes) == wanted)


CASE = Case("full_without_key", ABOUT, run, aim=5.0)
