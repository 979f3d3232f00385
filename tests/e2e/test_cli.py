"""The command line over a whole migration, with a broker of `migrate`'s own and on a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest

from live_migration.common.local_postgres import LocalPostgres
from live_migration.coordinator.workload import Writer, fill

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

COMMAND = (sys.executable, "-P", "-m", "live_migration.coordinator.cli")


class Terminal:
    """A command on a pseudo-terminal, and what it has shown so far."""

    def __init__(self, process: asyncio.subprocess.Process, controller: int) -> None:
        self.process = process
        self._controller = controller
        self.shown = ""

    def take(self) -> None:
        try:
            self.shown += os.read(self._controller, 65536).decode(errors="replace")
        except OSError:  # how Linux says that the other end is closed
            asyncio.get_running_loop().remove_reader(self._controller)

    def type(self, text: str) -> None:
        os.write(self._controller, text.encode())

    async def until(self, said: str, timeout: float = 180) -> None:
        async with asyncio.timeout(timeout):
            while said not in self.shown:
                assert self.process.returncode is None, self.shown
                await asyncio.sleep(0.05)


@asynccontextmanager
async def on_terminal(environment: dict[str, str], *arguments: str) -> AsyncIterator[Terminal]:
    controller, terminal = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True
    )
    os.close(terminal)
    shown = Terminal(process, controller)
    asyncio.get_running_loop().add_reader(controller, shown.take)
    try:
        yield shown
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(controller)
        os.close(controller)


async def run(environment: dict[str, str], *arguments: str, timeout: float = 180) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(timeout):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def environment(source_database: str, target_database: str, unique_name: str, tmp_path: Path) -> dict[str, str]:
    """What a user would export; no broker."""
    kept = {name: value for name, value in os.environ.items() if name not in ("SOURCE", "TARGET", "KAFKA")}
    ours = {"NAME": unique_name, "DIR": str(tmp_path / "data"), "CONSUMERS": "1"}
    return {
        **kept,
        "SOURCE": source_database,
        "TARGET": target_database,
        "TERM": "xterm",
        **{f"LIVE_MIGRATION_{name}": value for name, value in ours.items()},
    }


async def test_whole_migration_by_hand(environment: dict[str, str], tmp_path: Path) -> None:
    await fill(environment["SOURCE"], 20_000)
    assert (await run(environment, "validate"))[0] == 0
    code, _, said = await run(environment, "status")
    assert (code, "holds no migration" in said) == (1, True)
    async with Writer(environment["SOURCE"], connections=2) as writer:
        async with on_terminal(environment, "migrate") as screen:
            await screen.until("phase replay")
            await screen.until("Target has caught up with source")
            await screen.until("To stop replication, hit 'c' and then ENTER")
            await _look_at_it(environment)
            screen.process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(screen.process.wait(), 60) == 130
            assert "still held on the source" in screen.shown
            assert environment["LIVE_MIGRATION_NAME"] in screen.shown
        code, _, said = await run(environment, "cutover")
        assert (code, "no coordinator" in said) == (1, True)
        async with on_terminal(environment, "migrate") as screen:
            await screen.until("Target has caught up with source")
            await writer.stop()
            screen.type("c\n")
            assert await asyncio.wait_for(screen.process.wait(), 120) == 0, screen.shown
            assert "write to the target now" in screen.shown
            assert "changes replayed" in screen.shown
    await _compare_and_clean(environment, tmp_path)


async def _look_at_it(environment: dict[str, str]) -> None:
    """Run what other terminals run meanwhile; none of it needs to be told where the broker is."""
    code, out, _ = await run(environment, "status", "--json")
    status = json.loads(out)
    assert (code, status["phase"]) == (0, "replay")
    assert {table["state"] for table in status["tables"]} == {"ready"}
    assert status["lag"]["replay_lag_bytes"] >= 0
    assert {worker["kind"] for worker in status["workers"]} >= {"consumer", "coordinator"}
    assert status["producer"]["rss_bytes"] > 0
    assert status["troubles"] == []
    code, _, said = await run(environment, "status")
    assert (code, "phase replay" in said) == (0, True)
    code, out, _ = await run(environment, "tail", "--from-beginning", "--limit", "3", "--table", "demo.log")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, len(lines)) == (0, 3)
    assert [line["new"]["message"] for line in lines] == ["the same"] * 3


async def _compare_and_clean(environment: dict[str, str], tmp_path: Path) -> None:
    code, _, said = await run(environment, "migrate")
    assert (code, "done already" in said) == (0, True), said
    code, out, _ = await run(environment, "verify", "--json")
    assert (code, json.loads(out)["equal"]) == (0, True), out
    code, _, said = await run(environment, "clean")
    assert code == 0, said
    assert (tmp_path / "data" / "kafka").exists()
    for uri, query in (
        (environment["SOURCE"], "select count(*) from pg_replication_slots where database = current_database()"),
        (environment["SOURCE"], "select count(*) from pg_publication"),
        (environment["TARGET"], "select count(*) from pg_namespace where nspname = '_live_migration'"),
    ):
        connection = await asyncpg.connect(uri)
        assert await connection.fetchval(query) == 0, query
        await connection.close()
    connection = await asyncpg.connect(environment["TARGET"])
    await connection.execute("delete from demo.log where ctid = (select min(ctid) from demo.log)")
    await connection.close()
    code, _, said = await run(environment, "verify")
    assert code == 1
    assert "differ in 1 of 7 objects: table demo.log" in said
    code, _, said = await run(environment, "clean", "--prune")
    assert (code, (tmp_path / "data").exists()) == (0, False), said


def ours(mark: str) -> list[psutil.Process]:
    """Give the processes whose environment holds the mark: whatever a command started, and started through others."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == mark or mark in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [process for process in found if process.pid != os.getpid()]


@pytest.mark.parametrize("end", ["ctrl-c", "kill"])
async def test_demo_leaves_nothing_behind_however_it_ends(
    end: str, tmp_path: Path, source_server: LocalPostgres, request: pytest.FixtureRequest
) -> None:
    folder = Path(f"/tmp/lm-{os.getpid()}-{end}")  # not below a folder that the server's user cannot enter
    folder.mkdir(mode=0o755)
    request.addfinalizer(lambda: folder.rmdir() if folder.exists() else None)
    shared = Path("/tmp").glob(f"live-migration-*-{os.getuid()}")
    for cache in shared:  # the programs that this machine has unpacked already
        (folder / cache.name).symlink_to(cache)
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "demo", "--rows", "5000", "--seconds", "60",
        env={**os.environ, "TMPDIR": str(folder)}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    async with asyncio.timeout(180):
        while b"phase replay" not in (line := await process.stderr.readline()):
            assert line, "the demo ended by itself"
    started = ours(str(folder))
    assert len(started) > 5
    process.send_signal(signal.SIGINT if end == "ctrl-c" else signal.SIGKILL)
    rest = await asyncio.wait_for(process.stderr.read() if end == "ctrl-c" else asyncio.sleep(0, b""), 60)
    assert await asyncio.wait_for(process.wait(), 60) == (130 if end == "ctrl-c" else -signal.SIGKILL)
    assert b"Traceback" not in (rest or b"")
    await _until_true(lambda: not [each for each in started if each.is_running()])
    await _until_true(lambda: not [path for path in folder.iterdir() if not path.is_symlink()])
    for link in folder.iterdir():
        link.unlink()


async def _until_true(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not check():
            await asyncio.sleep(0.1)
