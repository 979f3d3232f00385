"""One big table, which we split into parts."""

from __future__ import annotations

from benchmarks.cases.case import Case
from benchmarks.cases.metrics import metrics_database
from benchmarks.contestants.ours_copy import OursCopy
from benchmarks.contestants.tools import DumpRestore
from benchmarks.results import CaseResult, Plan
from benchmarks.snapshot import measure_snapshot

ABOUT = "snapshot of one table of 10,000,000 rows with its primary key, split into 4 parts"
PARTS = 4
ROW_BYTES = 60


async def run(plan: Plan) -> CaseResult:
    rows = plan.scaled(10_000_000, least=10_000)
    database = metrics_database(rows)
    ours = OursCopy(options={"part_size": str(rows * ROW_BYTES // PARTS)})
    return await measure_snapshot("snapshot_one_table", ABOUT, plan, database, [ours, DumpRestore()])


CASE = Case("snapshot_one_table", ABOUT, run, aim=1.7)
