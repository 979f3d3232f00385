"""The same backlog beside Debezium, when it is asked for."""

from __future__ import annotations

from benchmarks.backlog import Contestant, measure_backlog
from benchmarks.cases.case import Case, Skipped
from benchmarks.cases.inserts import insert_backlog
from benchmarks.contestants.debezium import Debezium
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan

ABOUT = "slot backlog of 2,000,000 inserted rows, 10,000 a transaction, to all applied, beside Debezium"


async def run(plan: Plan) -> CaseResult:
    if not plan.with_debezium:
        raise Skipped("it is run with --with-debezium only, which downloads Debezium and Kafka Connect")
    contestants: list[Contestant] = [Ours(), Debezium(insert_mode="upsert"), Debezium(insert_mode="insert")]
    return await measure_backlog("backlog_debezium", ABOUT, plan, insert_backlog(plan), contestants)


CASE = Case("backlog_debezium", ABOUT, run)
