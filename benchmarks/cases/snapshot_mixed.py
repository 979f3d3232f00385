"""Snapshot with indexes beside pg_dump and pg_restore."""

from __future__ import annotations

from benchmarks.cases.case import Case
from benchmarks.cases.mixed import mixed_database
from benchmarks.contestants.ours_copy import OursCopy
from benchmarks.contestants.tools import DumpRestore
from benchmarks.results import CaseResult, Plan
from benchmarks.snapshot import measure_snapshot

ABOUT = "snapshot and indexes: 3,000,000 time-series rows and 1,000,000 jsonb events, about 510 MB"


async def run(plan: Plan) -> CaseResult:
    return await measure_snapshot("snapshot_mixed", ABOUT, plan, mixed_database(plan), [OursCopy(), DumpRestore()])


CASE = Case("snapshot_mixed", ABOUT, run, aim=1.7)
