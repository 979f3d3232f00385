"""The producer alone: the same rows, until Kafka has committed the last one."""

from __future__ import annotations

from benchmarks.backlog import measure_backlog
from benchmarks.cases.case import Case
from benchmarks.cases.inserts import insert_backlog
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan

ABOUT = "the same rows from slot to Kafka alone"


async def run(plan: Plan) -> CaseResult:
    return await measure_backlog(
        "slot_to_kafka", ABOUT, plan, insert_backlog(plan), [Ours(part="producer"), Native(binary=True)]
    )


CASE = Case("slot_to_kafka", ABOUT, run, aim=2.0)
