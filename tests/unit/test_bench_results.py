"""What the benchmarks make of their rounds: medians, ratios, the table, and results of earlier runs kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.cases import CASES
from benchmarks.cases.case import Skipped
from benchmarks.results import CaseResult, Entry, Plan, Round
from benchmarks.sampling import Usage


def entry(name: str, *seconds: float) -> Entry:
    return Entry(name, "1", [Round(each, 1000, Usage({"walsender": each}, {"walsender": each})) for each in seconds])


@pytest.fixture
def result() -> CaseResult:
    return CaseResult("updates", "about", [entry("ours", 2.0, 9.0, 1.0), entry("native", 4.0, 3.0, 50.0)])


def as_json(result: CaseResult) -> dict[str, object]:
    plan = Plan(rounds=3, scale=0.5, warm_up=True, is_long=False, folder=Path())
    return report.to_json([result], plan, {"cores": 2}, CASES)


def test_a_ratio_is_the_peers_median_by_ours(result: CaseResult) -> None:
    ours, native = result.entries
    assert ours.median_seconds == 2.0
    assert ours.rows_per_second == 500.0
    assert result.ratio(ours) is None
    assert result.ratio(native) == 2.0


def test_memory_is_the_highest_and_cpu_the_median(result: CaseResult) -> None:
    assert result.entries[0].peak_mib() == {"walsender": 9.0}
    assert result.entries[0].cpu_seconds() == {"walsender": 2.0}


def test_the_table_shows_the_ratio_beside_its_aim(result: CaseResult) -> None:
    table = report.to_table(as_json(result)["cases"])
    assert "| updates | native | 4.00 | 250 | 2.00 (aim 1.8) |" in table


def test_cases_of_an_earlier_run_are_kept(result: CaseResult, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    report.write(path, report.merge(path, as_json(result)))
    result.name = "deletes"
    report.write(path, report.merge(path, as_json(result)))
    cases = json.loads(path.read_text())["cases"]
    assert list(cases) == ["updates", "deletes"]
    assert cases["updates"]["scale"] == 0.5
    assert cases["updates"]["machine"] == {"cores": 2}


async def test_debezium_has_to_be_asked_for() -> None:
    plan = Plan(rounds=1, scale=0.01, warm_up=False, is_long=False, folder=Path())
    with pytest.raises(Skipped, match="--with-debezium"):
        await CASES["backlog_debezium"].run(plan)
