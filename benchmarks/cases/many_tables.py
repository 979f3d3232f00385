"""Ten thousand tables: what planning and start-up take beyond pg_dump and pg_restore, and with how much memory."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases.case import Case
from benchmarks.contestants.ours_copy import OursCopy
from benchmarks.contestants.tools import DumpRestore
from benchmarks.results import CaseResult, Plan
from benchmarks.snapshot import Database, measure_snapshot

ABOUT = "10,000 tables of one row: time until the copy begins, against pg_dump and pg_restore of the schema alone"
_TABLES_PER_STATEMENT = 500
_CREATE = """do $$ begin for i in {first} .. {last} loop
    execute format('create table public.t%s (id int primary key, at timestamptz default now(), note text)', i);
    execute format('insert into public.t%s values (%s, now(), ''one'')', i, i);
end loop; end $$"""


async def run(plan: Plan) -> CaseResult:
    count = plan.scaled(10_000)
    firsts = range(1, count + 1, _TABLES_PER_STATEMENT)
    database = Database(
        statements=tuple(
            _CREATE.format(first=first, last=min(first + _TABLES_PER_STATEMENT - 1, count)) for first in firsts
        ),
        tables=("public.t1", f"public.t{count}"),
        rows=count,
    )
    copiers = [OursCopy(), DumpRestore(schema_only=True)]
    once = replace(plan, rounds=1, warm_up=False)  # the copy of so many tables, not wanted here, takes minutes
    result = await measure_snapshot("many_tables", ABOUT, once, database, copiers)
    ours, peer = result.entries
    for each in ours.rounds:
        each.figures["start_up_beyond_dump_seconds"] = each.figures["until_copy_seconds"] - peer.median_seconds
    result.has_ratio = False
    return result


CASE = Case("many_tables", ABOUT, run)
