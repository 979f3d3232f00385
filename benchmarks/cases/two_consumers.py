"""Two consumers beside one, on a target that answers each statement late: the copy, where a consumer has `table_jobs` parts in hand.

In replay one consumer applies all its lanes at a time, each by a session of its own, so that a late answer holds up a lane and nobody else; see `lanes_by_key`.
"""

from __future__ import annotations

from benchmarks.cases.case import Case
from benchmarks.cases.metrics import metrics_database
from benchmarks.contestants.slowed import SlowedCopy
from benchmarks.results import CaseResult, Plan
from benchmarks.snapshot import measure_snapshot

ABOUT = "copy of a table of 5,000,000 rows in some 300 parts, each answer of the target 20 ms late: two consumers against one"
DELAY_SECONDS = 0.02


async def run(plan: Plan) -> CaseResult:
    rows = plan.scaled(5_000_000, least=10_000)
    database = metrics_database(rows)
    options = {"part_size": str(1 << 20)}
    copiers = [SlowedCopy(consumers, DELAY_SECONDS, options) for consumers in (2, 1)]
    return await measure_snapshot("two_consumers", ABOUT, plan, database, copiers)


CASE = Case("two_consumers", ABOUT, run, aim=1.8)
