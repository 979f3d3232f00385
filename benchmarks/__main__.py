"""`make bench`: runs the cases that are named, prints a table and writes benchmarks/results.json."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.cases import CASES
from benchmarks.cases.case import Skipped
from benchmarks.results import Plan

_RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.list:
        for case in CASES.values():
            print(f"{case.name:20} {case.about}")
        return
    if arguments.table:
        print(report.to_table(json.loads(arguments.results.read_text())["cases"]))
        return
    unknown = set(arguments.cases) - CASES.keys()
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}; --list names them")
    with tempfile.TemporaryDirectory(prefix="live-migration-bench-") as folder:
        plan = Plan(
            rounds=arguments.rounds,
            scale=arguments.scale,
            warm_up=not arguments.no_warm_up,
            is_long=arguments.long,
            folder=Path(folder),
            with_debezium=arguments.with_debezium,
        )
        asyncio.run(_run(plan, arguments.cases or list(CASES), arguments.results))


async def _run(plan: Plan, names: list[str], path: Path) -> None:
    """Write the results after each case, so that an interrupted run keeps what it has."""
    where = report.machine()
    results = []
    for name in names:
        print(f"{name}: {CASES[name].about}", flush=True)
        try:
            results.append(await CASES[name].run(plan))
        except Skipped as skipped:
            print(f"  {name}: skipped, {skipped}")
            continue
        report.write(path, report.merge(path, report.to_json(results[-1:], plan, where, CASES)))
    print(report.to_table(report.to_json(results, plan, where, CASES)["cases"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all by default")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--table", action="store_true", help="print the results that are there as a table, and end")
    parser.add_argument("--rounds", type=int, default=3, help="measured runs of each contestant")
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks row counts, for a quick try")
    parser.add_argument("--no-warm-up", action="store_true", help="count the first round too")
    parser.add_argument("--long", action="store_true", help="also what takes very long: cost_per_row up to 30 M rows")
    parser.add_argument("--with-debezium", action="store_true", help="also backlog_debezium, which downloads its peer")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="the JSON file, to which cases are added")
    return parser


if __name__ == "__main__":
    main()
