"""Peers that copy by programs of their own: pg_dump with pg_restore, and pgcopydb."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.results import Round
from benchmarks.sampling import Sampler
from benchmarks.servers import Servers
from live_migration.common.local_postgres import wheel_binaries


class DumpRestore:
    """pg_dump into a folder, uncompressed, then pg_restore, each with `jobs` jobs."""

    def __init__(self, *, jobs: int = 2, schema_only: bool = False) -> None:
        self._jobs = str(jobs)
        self.copies_rows = not schema_only
        self.name = "pg_dump and pg_restore of the schema" if schema_only else f"pg_dump -j{jobs}, pg_restore -j{jobs}"

    def version(self, server: str) -> str:
        return f"{_output(wheel_binaries() / 'pg_dump', '--version')} on PostgreSQL {server}"

    async def copy(self, servers: Servers, rows: int) -> Round:
        with tempfile.TemporaryDirectory(prefix="live-migration-bench-") as folder:
            dump = Path(folder, "dump")
            only = ["--schema-only"] if not self.copies_rows else []
            commands = [
                ["pg_dump", *only, "-Fd", "-j", self._jobs, "-Z0", "-f", str(dump), servers.source_uri],
                ["pg_restore", "-j", self._jobs, "-d", servers.target_uri, str(dump)],
            ]
            return await _measured(servers, rows, [[str(wheel_binaries() / each[0]), *each[1:]] for each in commands])

    async def clean(self, servers: Servers) -> None:
        pass


class PgCopyDb:
    """pgcopydb clone. It ends with VACUUM ANALYZE of each table, which its version 0.10 cannot leave out."""

    copies_rows = True

    def __init__(self, *, table_jobs: int = 4) -> None:
        self._jobs = str(table_jobs)
        self.name = f"pgcopydb clone, {table_jobs} table jobs"

    @staticmethod
    def is_installed() -> bool:
        return shutil.which("pgcopydb") is not None

    def version(self, server: str) -> str:
        found = re.search(r"pgcopydb version \S+", _output("pgcopydb", "--version"))
        return f"{found[0] if found else 'pgcopydb'} on PostgreSQL {server}"

    async def copy(self, servers: Servers, rows: int) -> Round:
        with tempfile.TemporaryDirectory(prefix="live-migration-bench-") as folder:
            uris = ["--source", servers.source_uri, "--target", servers.target_uri]
            jobs = ["--table-jobs", self._jobs, "--index-jobs", self._jobs]
            return await _measured(servers, rows, [["pgcopydb", "clone", *uris, *jobs, "--dir", f"{folder}/work"]])

    async def clean(self, servers: Servers) -> None:
        pass


async def _measured(servers: Servers, rows: int, commands: list[list[str]]) -> Round:
    """Run commands one after the other; raises RuntimeError with what one printed when it fails."""
    pids: dict[int, str] = {}

    def kind_of(process: psutil.Process) -> str | None:
        return servers.kind_of(process) or pids.get(process.pid)

    figures: dict[str, float] = {}
    sampler = Sampler(kind_of)
    async with sampler:
        began = time.monotonic()
        for command in commands:
            name, since = Path(command[0]).name, time.monotonic()
            process = await asyncio.create_subprocess_exec(
                *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "LC_ALL": "C"}
            )
            pids[process.pid] = name
            out, _ = await process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"{name} ended with code {process.returncode}:\n{out.decode()[-2000:]}")
            figures[f"{name}_seconds"] = time.monotonic() - since
        ended = time.monotonic()
    return Round(ended - began, rows, sampler.usage, figures if len(commands) > 1 else {})


def _output(program: str | Path, *arguments: str) -> str:
    ran = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return (ran.stdout + ran.stderr).strip()
