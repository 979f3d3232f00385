"""The log of rounds: one JSON line each, over as many runs as there are."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

_MISSES = re.compile(
    r"^(nobody|skipped|did not end)|: 0 (connections|of )|, 0 in |^0 taken|InvalidSchemaNameError|UndefinedTableError"
)


def read(log: Path) -> list[dict[str, Any]]:
    """Give the rounds of a log, oldest first; none where there is no log."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def append(log: Path, line: dict[str, Any]) -> None:
    with log.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def passed_seeds(log: Path) -> set[int]:
    """Give the seeds that the log has as passed."""
    return {line["seed"] for line in read(log) if line["verdict"] == "ok"}


def has_hit(fault: dict[str, Any]) -> bool:
    """Tell whether a fault met somebody; lines that are older than that flag are judged by their words."""
    return bool(fault["hit"]) if "hit" in fault else _MISSES.search(fault["what"]) is None


def summary(rounds: list[dict[str, Any]]) -> str:
    """Give the table of faults for docs/reliability.md, and a line for each round that failed.

    A fault that hit nothing does not count.
    """
    hits = [(fault["fault"], fault["phase"]) for line in rounds for fault in line["faults"] if has_hit(fault)]
    missed = sum(not has_hit(fault) for line in rounds for fault in line["faults"])
    least = min((_hit_count(line) for line in rounds), default=0)
    transactions = sum(line["commits"] for line in rounds)
    seconds = [line["seconds"] for line in rounds]
    failed = [line for line in rounds if line["verdict"] != "ok"]
    told = [
        (
            f"{len(rounds)} rounds, {len(failed)} failed, {len(hits)} faults (at least {least} a round) and {missed} that hit nothing, {transactions} source transactions, "
            f"median {median(seconds or [0]):.0f} s a round"
        ),
        "",
        "| fault | times |",
        "|---|---|",
        *(f"| {fault} | {count} |" for fault, count in Counter(fault for fault, _ in hits).most_common()),
        "",
        "by phase: "
        + ", ".join(f"{phase} {count}" for phase, count in Counter(phase for _, phase in hits).most_common()),
        *_newcomers(rounds),
        *(f"failed: seed {line['seed']} of {line.get('revision', '?')}: {line['why'][:200]}" for line in failed),
    ]
    return "\n".join(told)


def _newcomers(rounds: list[dict[str, Any]]) -> list[str]:
    """Give one line of what happened to newcomers, none where there was none."""
    happened = Counter[str]()
    for line in rounds:
        happened.update(line.get("newcomers", {}))
    return [f"newcomers: {', '.join(f'{what} {count}' for what, count in happened.most_common())}"] if happened else []


def _hit_count(line: dict[str, Any]) -> int:
    return sum(has_hit(fault) for fault in line["faults"])
