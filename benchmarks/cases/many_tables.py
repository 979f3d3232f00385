"""Ten thousand tables: what a migration of them takes beyond pg_dump and pg_restore, and with how much memory."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases.case import Case
from benchmarks.contestants.ours_copy import OursCopy
from benchmarks.contestants.tools import DumpRestore
from benchmarks.results import CaseResult, Plan
from benchmarks.snapshot import Database, measure_snapshot

ABOUT = "10,000 small tables with a key and an index, every third empty: from the start to the replay, beside pg_dump and pg_restore"
_TABLES_PER_STATEMENT = 500
_COMPARED = 50
_CREATE = """do $$ begin for i in {first} .. {last} loop
    execute format('create table public.t%s (id int primary key, at timestamptz default now(), note text)', i);
    execute format('create index on public.t%s (at)', i);
    if i % 3 > 0 then
        execute format('insert into public.t%s select g, now(), repeat(''n'', g) from generate_series(1, %s) g', i, 1 + i % 20);
    end if;
end loop; end $$"""


async def run(plan: Plan) -> CaseResult:
    count = plan.scaled(10_000)
    firsts = range(1, count + 1, _TABLES_PER_STATEMENT)
    database = Database(
        statements=tuple(
            _CREATE.format(first=first, last=min(first + _TABLES_PER_STATEMENT - 1, count)) for first in firsts
        ),
        tables=tuple(f"public.t{number}" for number in range(1, count + 1, max(1, count // _COMPARED))),
        rows=sum(1 + number % 20 for number in range(1, count + 1) if number % 3),
    )
    copiers = [OursCopy(), DumpRestore()]
    once = replace(plan, rounds=1, warm_up=False)
    result = await measure_snapshot("many_tables", ABOUT, once, database, copiers)
    ours, peer = result.entries
    for each in ours.rounds:
        each.figures["beyond_dump_and_restore_seconds"] = each.figures["whole_seconds"] - peer.median_seconds
        each.figures["whole_ratio"] = peer.median_seconds / each.figures["whole_seconds"]
    result.has_ratio = False  # of the copy phase alone, it would leave out what this case is about
    return result


CASE = Case("many_tables", ABOUT, run)
