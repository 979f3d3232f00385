"""The consumer alone: the same rows, the log being in Kafka already."""

from __future__ import annotations

from benchmarks.backlog import measure_backlog
from benchmarks.cases.case import Case
from benchmarks.cases.inserts import insert_backlog
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan

ABOUT = "the same rows from Kafka alone: log already there, one lane"


async def run(plan: Plan) -> CaseResult:
    return await measure_backlog(
        "kafka_to_target", ABOUT, plan, insert_backlog(plan), [Ours(part="consumer"), Native(binary=True)]
    )


CASE = Case("kafka_to_target", ABOUT, run, aim=2.2)
