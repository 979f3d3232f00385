"""Workers that end: which of them are restarted, and which are given up."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from live_migration.common.settings import Settings
from live_migration.coordinator import workers
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.workers import WorkerFailed, WorkerPool, _Worker
from tests.e2e.migration import RecordingObserver


def ending(code: int) -> subprocess.Popen[bytes]:
    return cast("subprocess.Popen[bytes]", SimpleNamespace(poll=lambda: code))


@pytest.fixture
def pool() -> WorkerPool:
    return WorkerPool(cast(Settings, None), Reporter(RecordingObserver()))


def end(pool: WorkerPool, worker: _Worker, code: int) -> float:
    """Have it end at once; give the pause before it is started again."""
    worker.started_at, worker.process = 1000.0, ending(code)
    pool._look_after(worker)
    return worker.next_start - 1000.0


@pytest.fixture(autouse=True)
def _stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: 1000.0))


def test_one_that_leaves_without_an_error_is_never_given_up(pool: WorkerPool, tmp_path: Path) -> None:
    """So consumers leave when the migration is done, which the coordinator may not have come to notice."""
    worker = _Worker("consumer", tmp_path / "log")
    assert [end(pool, worker, 0) for _ in range(8)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0, 10.0]


def test_one_that_dies_again_and_again_is_given_up(pool: WorkerPool, tmp_path: Path) -> None:
    worker = _Worker("consumer", tmp_path / "log")
    worker.log.touch()
    for _ in range(4):
        end(pool, worker, 1)
    end(pool, worker, 0)
    for _ in range(4):
        end(pool, worker, 1)
    with pytest.raises(WorkerFailed, match="ended 5 times in a row, exit code 1"):
        end(pool, worker, 1)
