"""Results as a table for people and as JSON."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cases.case import Case
from benchmarks.results import CaseResult, Entry, Plan
from benchmarks.servers import settings_used

_HEADINGS = (
    "case",
    "contestant",
    "seconds",
    "rows/s",
    "ratio",
    "CPU s (all kinds)",
    "peak MiB (ours)",
    "others' CPU s",
)


def machine() -> dict[str, Any]:
    """Describe where this ran."""
    return {
        "cores": psutil.cpu_count(),
        "cpu": _cpu_model(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "tcp_congestion_control": _congestion_control(),
        "load_average_at_start": round(psutil.getloadavg()[0], 2),
    }


def to_json(results: list[CaseResult], plan: Plan, where: dict[str, Any], aims: dict[str, Case]) -> dict[str, Any]:
    """Give all that was measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": where,
        "settings": settings_used(),
        "rounds": plan.rounds,
        "warm_up": plan.warm_up,
        "scale": plan.scale,
        "cases": {
            each.name: {
                "about": each.about,
                "aim": aims[each.name].aim,
                "contestants": [_entry_to_json(each, entry) for entry in each.entries],
            }
            for each in results
        },
    }


def merge(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """Keep the cases of an earlier run that were not run now, each with the date and the scale it was run at."""
    for case in fresh["cases"].values():
        case.update({name: fresh[name] for name in ("date", "machine", "rounds", "scale")})
    if path.exists():
        fresh["cases"] = {**json.loads(path.read_text())["cases"], **fresh["cases"]}
    return fresh


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def to_table(cases: dict[str, Any]) -> str:
    """Give a Markdown table of what `to_json` gave as `cases`."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    for name, case in cases.items():
        for entry in case["contestants"]:
            ratio = "" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
            if ratio and case["aim"] and entry is case["contestants"][1]:
                ratio += f" (aim {case['aim']:g})"
            cells = (
                name if case.get("scale", 1.0) == 1.0 else f"{name} × {case['scale']:g}",
                entry["contestant"],
                f"{entry['median_seconds']:.2f}",
                f"{entry['rows_per_second']:,.0f}",
                ratio,
                ", ".join(f"{kind} {used:.1f}" for kind, used in entry["cpu_seconds"].items() if used >= 0.05),
                ", ".join(f"{kind} {mib:.0f}" for kind, mib in entry["peak_mib"].items() if kind.startswith("our ")),
                f"{entry['other_cpu_seconds']:.1f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
            if entry["figures"]:
                told = ", ".join(f"{what} {value:,.1f}" for what, value in entry["figures"].items())
                lines.append(f"| | | | | | {told} | | |")
    return "\n".join(lines)


def _entry_to_json(result: CaseResult, entry: Entry) -> dict[str, Any]:
    ratio = result.ratio(entry)
    return {
        "contestant": entry.contestant,
        "version": entry.version,
        "median_seconds": round(entry.median_seconds, 3),
        "seconds": [round(each.seconds, 3) for each in entry.rounds],
        "rows": entry.rounds[0].rows,
        "rows_per_second": round(entry.rows_per_second),
        "ratio": None if ratio is None else round(ratio, 3),
        "cpu_seconds": {kind: round(used, 2) for kind, used in entry.cpu_seconds().items()},
        "peak_mib": {kind: round(mib, 1) for kind, mib in entry.peak_mib().items()},
        "other_cpu_seconds": round(entry.other_cpu_seconds(), 2),
        "figures": {what: round(value, 6) for what, value in entry.figures().items()},
    }


def _congestion_control() -> str:
    """Name what decides whether a walsender's rows gather in packets: docs/performance.md."""
    setting = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return setting.read_text().strip() if setting.exists() else "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
