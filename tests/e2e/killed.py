"""A command that is killed at a moment made certain: right after one of its functions has done its work."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from tests.e2e.processes import Cli

_KILLED = """
import importlib, os, signal, sys
module, function, count = sys.argv[1:4]
place = importlib.import_module(module)
original = getattr(place, function)
calls = 0

async def killed(*arguments, **options):
    global calls
    result = await original(*arguments, **options)
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(place, function, killed)
from live_migration.coordinator.commands import run
sys.exit(run(sys.argv[4:]))
"""

COORDINATOR = "live_migration.coordinator"


async def run_killed(cli: Cli, step: tuple[str, str, int], *arguments: str) -> None:
    """Run a command that is killed at a step: a function by its module and name, at its n-th call. Fail where it ends otherwise."""
    module, function, count = step
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", _KILLED, module, function, str(count), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **cli.environment},
    )
    async with asyncio.timeout(120):
        out, _ = await process.communicate()
    assert process.returncode == -signal.SIGKILL, f"{function}: {process.returncode}: {out.decode()}"
