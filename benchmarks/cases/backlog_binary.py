"""From the slot to all applied, both services running."""

from __future__ import annotations

from benchmarks.backlog import measure_backlog
from benchmarks.cases.case import Case
from benchmarks.cases.inserts import insert_backlog
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan

ABOUT = "slot backlog of 2,000,000 inserted rows, 10,000 a transaction, to all applied"


async def run(plan: Plan) -> CaseResult:
    return await measure_backlog("backlog_binary", ABOUT, plan, insert_backlog(plan), [Ours(), Native(binary=True)])


CASE = Case("backlog_binary", ABOUT, run, aim=1.5)
