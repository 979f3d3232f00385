"""The containers: docker-compose.yml's demo migration, with one of its consumers killed on the way."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.docker import docker, require_images

ROOT = Path(__file__).resolve().parents[2]
COPYING_HOST = """
    select host from _live_migration.workers w
    where exists (select from _live_migration.tables t where t.state = 'copying' and t.owner = w.id) limit 1
"""

pytestmark = [pytest.mark.docker, pytest.mark.e2e, pytest.mark.timeout(1200)]


class Stack:
    """One `docker compose` project of its own name, so that a demo of the user's is not touched."""

    def __init__(self) -> None:
        self.name = f"live-migration-test-{os.getpid()}"
        self.environment = {
            **os.environ,
            "IMAGE": self.name,
            "DEMO_PASSWORD": "of-this-test-only",
            "DEMO_ROWS": "600000",
            "DEMO_WRITE_SECONDS": "30",
            "DEMO_WRITE_RATE": "200",
        }

    def run(self, *words: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            ["docker", "compose", "--project-name", self.name, *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or ran.returncode == 0, f"{words}: {ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
        return ran

    def query(self, server: str, sql: str) -> str:
        """Give the answer of a server's psql; nothing while there is none."""
        return self.run("exec", "-T", server, "psql", "-U", "postgres", "-Atc", sql, "app", check=False).stdout.strip()

    def await_answer(self, server: str, sql: str, timeout: float = 300) -> str:
        deadline = time.monotonic() + timeout
        while not (answer := self.query(server, sql)):
            assert time.monotonic() < deadline, f"no answer to {sql}\n{self.logs('coordinator')}"
            assert self.state("coordinator") == "running", self.logs("coordinator")
            time.sleep(0.2)
        return answer

    def await_exit(self, service: str, timeout: float = 300) -> str:
        """Give the exit code of a service that ends by itself."""
        deadline = time.monotonic() + timeout
        while self.state(service) != "exited":
            assert time.monotonic() < deadline, f"{service} does not end\n{self.logs(service)}"
            time.sleep(0.5)
        return self.run("ps", "--all", "--format", "{{.ExitCode}}", service).stdout.strip()

    def state(self, service: str) -> str:
        return self.run("ps", "--all", "--format", "{{.State}}", service).stdout.strip()

    def logs(self, service: str) -> str:
        return self.run("logs", "--no-log-prefix", "--no-color", service, check=False).stdout[-6000:]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    _require_engine()
    stack = Stack()
    try:
        services = ("coordinator", "producer", "consumer")  # and what they depend on; the cutover comes later
        stack.run("up", "--build", "--detach", "--quiet-pull", "--scale", "consumer=2", *services, timeout=900)
        yield stack
    finally:
        stack.run("down", "--volumes", "--remove-orphans", "--rmi", "local", "--timeout", "5", check=False)
        subprocess.run(["docker", "image", "rm", stack.name], capture_output=True, check=False)


def _require_engine() -> None:
    require_images()
    if docker("compose", "version").returncode:
        pytest.skip("docker has no compose plugin")
    words = (ROOT / "Dockerfile").read_text() + (ROOT / "docker-compose.yml").read_text()
    require_images(*sorted(set(re.findall(r"^(?:FROM| *image:) +([a-z/]+:[\w.-]+)", words, re.MULTILINE))))


def test_migration_ends_although_a_consumer_is_killed_while_it_copies(stack: Stack) -> None:
    host = stack.await_answer("target", COPYING_HOST)
    assert docker("kill", "--signal", "KILL", host).returncode == 0
    stack.run("up", "--detach", "--no-recreate", "cutover")
    assert stack.await_exit("coordinator") == "0", stack.logs("coordinator")
    assert stack.query("source", "select writer_ended_at is not null from demo.run") == "t", "cut over under a writer"


def test_verify_finds_both_sides_equal_afterwards(stack: Stack) -> None:
    verified = stack.run("run", "--rm", "-T", "coordinator", "verify", check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_source_and_target_have_the_same_rows_by_psql(stack: Stack) -> None:
    for table in ("readings", "customers", "orders", "events", "log", "run"):
        digest = f"select count(*), sum(hashtextextended(t::text, 0)) from demo.{table} t"
        assert stack.query("source", digest) == stack.query("target", digest) != "", table


def test_starting_all_again_after_the_end_changes_nothing(stack: Stack) -> None:
    run = stack.query("source", "select * from demo.run")
    stack.run("up", "--detach")
    assert stack.await_exit("coordinator") == "0", stack.logs("coordinator")
    assert stack.query("source", "select * from demo.run") == run
    assert stack.run("run", "--rm", "-T", "coordinator", "verify", check=False).returncode == 0


def test_nothing_runs_as_root_and_no_password_is_told(stack: Stack) -> None:
    assert (
        stack.run("run", "--rm", "-T", "--no-deps", "--entrypoint", "id", "coordinator", "-u").stdout.strip() == "10001"
    )
    for service in ("coordinator", "consumer", "producer"):
        assert stack.environment["DEMO_PASSWORD"] not in stack.logs(service)


def test_verify_names_a_row_that_was_changed_on_the_target(stack: Stack) -> None:
    stack.query("target", "update demo.customers set balance = balance + 1 where id = 7")
    verified = stack.run("run", "--rm", "-T", "coordinator", "verify", check=False)
    assert verified.returncode == 1
    assert "demo.customers" in verified.stdout + verified.stderr
