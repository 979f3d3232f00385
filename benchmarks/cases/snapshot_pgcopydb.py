"""The same snapshot beside pgcopydb, where it is installed; Debian's speaks to PostgreSQL 15 at most."""

from __future__ import annotations

from benchmarks.cases.case import Case, Skipped
from benchmarks.cases.mixed import mixed_database
from benchmarks.contestants.ours_copy import OursCopy
from benchmarks.contestants.tools import PgCopyDb
from benchmarks.results import CaseResult, Plan
from benchmarks.snapshot import measure_snapshot

ABOUT = "the same snapshot on PostgreSQL 15, beside pgcopydb"
SERVER_MAJOR = 15


async def run(plan: Plan) -> CaseResult:
    if not PgCopyDb.is_installed():
        raise Skipped("pgcopydb is not on PATH (Debian's package `pgcopydb`)")
    copiers = [OursCopy(), PgCopyDb(table_jobs=4)]
    return await measure_snapshot("snapshot_pgcopydb", ABOUT, plan, mixed_database(plan), copiers, major=SERVER_MAJOR)


CASE = Case("snapshot_pgcopydb", ABOUT, run, aim=1.5)
