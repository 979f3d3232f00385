"""Questions on a terminal: what `migrate` takes for consent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from live_migration.common.errors import TargetError
from live_migration.common.settings import Settings, load_settings
from live_migration.coordinator import migrating
from live_migration.coordinator.hypertable_candidates import Candidate
from live_migration.coordinator.hypertable_spec import parse_spec
from live_migration.coordinator.source_jobs import Job

POLICY = Job(1000, "Columnstore Policy [1000]", "alice", True, "public.metrics", True, True)
ACTION = Job(1001, "User-Defined Action [1001]", "alice", True, "public.act", False, True)


@contextmanager
def terminal(typed: bytes) -> Iterator[int]:
    reading, writing = os.pipe()
    os.write(writing, typed)
    os.close(writing)
    try:
        yield reading
    finally:
        os.close(reading)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    found = [POLICY, ACTION]

    async def find(_: Settings) -> list[Job]:
        if not found:
            raise TargetError("away")
        return found

    monkeypatch.setattr(migrating, "find_jobs_to_pause", find)
    return found


@pytest.mark.parametrize(
    ("typed", "is_consent"), [(b"y\n", True), (b" YES \n", True), (b"\n", False), (b"c\n", False), (b"", False)]
)
async def test_only_a_yes_is_consent(
    typed: bytes, is_consent: bool, jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    with terminal(typed) as file:
        asked = await migrating.ask_to_pause_jobs(load_settings({}), file)
    assert asked.pause_source_jobs is is_consent
    said = capsys.readouterr().err
    assert "  moves data: Columnstore Policy [1000] of public.metrics\n" in said
    assert "  may move data: User-Defined Action [1001] of public.act\n" in said


async def test_nothing_is_asked_where_a_server_cannot_be(jobs: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    jobs.clear()
    with terminal(b"y\n") as file:
        asked = await migrating.ask_to_pause_jobs(load_settings({}), file)
    assert not asked.pause_source_jobs
    assert capsys.readouterr().err == ""


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    found = [Candidate(parse_spec(text), 5 << 30, 1_000_000, None) for text in ("public.m:time,1 day", "e:at,7 days")]

    async def find(_: Settings) -> list[Candidate]:
        return found

    monkeypatch.setattr(migrating, "_find_candidates", find)
    return found


async def test_each_proposed_hypertable_is_asked_for(
    candidates: list[Candidate], capsys: pytest.CaptureFixture[str]
) -> None:
    with terminal(b"y\n") as file:  # the second question meets the end of what is typed
        asked = await migrating.ask_for_hypertables(load_settings({}), file)
    assert asked.hypertable == ("public.m:time,1 day",)
    assert "public.e:at,7 days (5.0 GiB" in capsys.readouterr().err


async def test_without_a_terminal_hypertables_are_named_and_none_is_made(
    candidates: list[Candidate], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = await migrating.ask_for_hypertables(load_settings({}), None)
    assert asked.hypertable == ()
    said = capsys.readouterr().err
    assert "come over as plain tables" in said
    assert "--hypertable 'public.e:at,7 days'" in said


async def test_a_question_can_be_cancelled() -> None:
    reading, writing = os.pipe()
    task = asyncio.ensure_future(migrating.read_line(reading))
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    os.close(reading)
    os.close(writing)
