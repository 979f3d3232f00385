"""The benchmarks' harness still runs: one small case, with a peer, to a result whose rows were compared."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

ROOT = Path(__file__).parents[2]


async def test_a_small_case_gives_a_result_for_us_and_the_peer(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks", "backlog_binary", "--rounds", "1", "--scale", "0.01", "--no-warm-up"),
        *("--results", str(results)),
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": ""},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    ours, native = json.loads(results.read_text())["cases"]["backlog_binary"]["contestants"]
    assert ours["rows"] == native["rows"] == 20_000
    assert native["ratio"] == pytest.approx(native["median_seconds"] / ours["median_seconds"], rel=0.02)
    assert ours["cpu_seconds"]["our producer"] > 0
    assert ours["cpu_seconds"]["our consumer"] > 0
    assert ours["peak_mib"]["broker"] > 0
    assert native["cpu_seconds"]["apply worker"] > 0


async def test_the_cases_are_named() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks", "--list"),
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": ""},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert b"backlog_binary" in out
