"""Whether a row costs the same in a short and in a long backlog."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.backlog import measure_backlog
from benchmarks.cases.case import Case
from benchmarks.cases.inserts import insert_backlog
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Entry, Plan

ABOUT = "µs per row of backlogs of 1, 3 and 10 million inserted rows (30 with --long), one measured round each"
MILLIONS = (1, 3, 10)
LONG_MILLIONS = (30,)


async def run(plan: Plan) -> CaseResult:
    result = CaseResult("cost_per_row", ABOUT, [], has_ratio=False)
    for millions in MILLIONS + (LONG_MILLIONS if plan.is_long else ()):
        once = replace(plan, rounds=1, warm_up=False)
        backlog = insert_backlog(plan, millions * 1_000_000)
        measured = await measure_backlog("cost_per_row", ABOUT, once, backlog, [Ours()])
        result.entries.append(_with_cost(measured.entries[0], millions))
    return result


def _with_cost(entry: Entry, millions: int) -> Entry:
    entry.contestant = f"ours, {millions} M rows"
    for each in entry.rounds:
        ours = sum(used for kind, used in each.usage.cpu_seconds.items() if kind.startswith("our "))
        each.figures["us_per_row"] = each.seconds * 1e6 / each.rows
        each.figures["our_cpu_us_per_row"] = ours * 1e6 / each.rows
        each.figures["all_cpu_us_per_row"] = sum(each.usage.cpu_seconds.values()) * 1e6 / each.rows
    return entry


CASE = Case("cost_per_row", ABOUT, run)
