"""What is measured: rounds of a contestant, and the results of a case."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.sampling import Usage


@dataclass(frozen=True)
class Plan:
    """How much of everything: asked for on the command line."""

    rounds: int
    scale: float
    warm_up: bool
    is_long: bool
    folder: Path
    with_debezium: bool = False

    def scaled(self, count: int, *, least: int = 1) -> int:
        """Give a row count shrunk by the scale."""
        return max(least, round(count * self.scale))


@dataclass(frozen=True)
class Round:
    """One measured run. `figures`: what is worth telling beside the time, with its unit in the name."""

    seconds: float
    rows: int
    usage: Usage
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Entry:
    """A contestant's rounds in a case."""

    contestant: str
    version: str = ""
    rounds: list[Round] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        return statistics.median(each.seconds for each in self.rounds)

    @property
    def rows_per_second(self) -> float:
        return statistics.median(each.rows / each.seconds for each in self.rounds)

    def cpu_seconds(self) -> dict[str, float]:
        """Give the median by kind of process."""
        return _medians([each.usage.cpu_seconds for each in self.rounds])

    def peak_mib(self) -> dict[str, float]:
        """Give the highest by kind of process."""
        kinds = {kind for each in self.rounds for kind in each.usage.peak_mib}
        return {kind: max(each.usage.peak_mib.get(kind, 0.0) for each in self.rounds) for kind in sorted(kinds)}

    def other_cpu_seconds(self) -> float:
        return statistics.median(each.usage.other_cpu_seconds for each in self.rounds)

    def figures(self) -> dict[str, float]:
        return _medians([each.figures for each in self.rounds])


@dataclass
class CaseResult:
    """A case's entries; the first is ours, ratios are the others' times by its. `has_ratio`: whether there are any."""

    name: str
    about: str
    entries: list[Entry]
    has_ratio: bool = True

    def ratio(self, entry: Entry) -> float | None:
        """Give the time of a contestant by that of the first one."""
        if entry is self.entries[0] or not self.has_ratio:
            return None
        return entry.median_seconds / self.entries[0].median_seconds


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for each in rounds for name in each})
    return {name: statistics.median(each.get(name, 0.0) for each in rounds) for name in names}
