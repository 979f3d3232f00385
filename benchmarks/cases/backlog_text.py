"""The same rows in text mode, which sources with user-defined types need."""

from __future__ import annotations

from benchmarks.backlog import measure_backlog
from benchmarks.cases.case import Case
from benchmarks.cases.inserts import insert_backlog
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan

ABOUT = "the same rows in text mode"


async def run(plan: Plan) -> CaseResult:
    return await measure_backlog(
        "backlog_text", ABOUT, plan, insert_backlog(plan, forces_text=True), [Ours(), Native(binary=False)]
    )


CASE = Case("backlog_text", ABOUT, run, aim=1.4)
