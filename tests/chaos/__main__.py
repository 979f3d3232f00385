"""Run rounds: `python -m tests.chaos --rounds 10 --seed 1`, or `make chaos ROUNDS=10 SEED=1`.

Prints each round's seed, its faults and their moments, its verdict and seconds; appends a JSON line for each to the log, and
leaves out seeds that stand there as passed. A round that fails leaves its folder with the logs of all processes and the migration's state.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.chaos import journal
from tests.chaos.disks import enter_namespace
from tests.chaos.plan import make_plan
from tests.chaos.round import Outcome, Round
from tests.chaos.soak import Soak
from tests.chaos.world import World


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how many seeds, those passed before included")
    parser.add_argument("--seed", type=int, default=1, help="the first one; each round has the next")
    parser.add_argument("--minutes", type=float, help="begin no round after so many minutes")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "live-migration-chaos")
    parser.add_argument("--log", type=Path, help="JSON lines of the rounds; by default rounds.jsonl in the folder")
    parser.add_argument(
        "--soak", type=float, metavar="MINUTES", help="no rounds, but one migration in replay for so long"
    )
    parser.add_argument("--rate", type=int, default=4000, help="changes a second in a soak, beside the random workload")
    parser.add_argument(
        "--spare",
        nargs="*",
        default=[],
        choices=("producer", "consumer", "migrate"),
        help="kinds whose oldest process a soak never kills, so that its memory is seen over the whole time",
    )
    parser.add_argument("--consumers", type=int, default=2, help="of a soak")
    parser.add_argument("--summary", action="store_true", help="run nothing, but say what the log holds")
    parser.add_argument("--again", action="store_true", help="run seeds that have passed, too")
    parser.add_argument("--stop", action="store_true", help="stop at the first failure")
    return parser.parse_args()


def _report(outcome: Outcome, world: World, folder: Path) -> None:
    print(f"seed {outcome.seed}: {json.dumps(outcome.plan)}")
    for happened in sorted(outcome.faults, key=lambda each: each.at):
        print(f"  {happened}")
    if outcome.newcomers:
        print(f"  newcomers: {json.dumps(outcome.newcomers)}")
    for line in outcome.exits:
        print(f"  exit: {line}")
    print(f"  {outcome.verdict}: {outcome.commits} transactions, {outcome.seconds} s", outcome.why, flush=True)
    if outcome.verdict == "ok":
        shutil.rmtree(folder, ignore_errors=True)
        return
    (folder / "outcome.json").write_text(json.dumps(outcome.as_dict(), indent=1))
    for name, path in world.logs().items():
        if path.exists():
            shutil.copyfile(path, folder / name)
    print(f"  logs: {folder}\n  again: make chaos ROUNDS=1 SEED={outcome.seed}", flush=True)


async def _soak(arguments: argparse.Namespace) -> int:
    folder = arguments.folder / f"soak-{time.strftime('%d%H%M%S')}"
    plan = replace(
        make_plan(arguments.seed),
        steps=(),
        possible=(),
        options={},
        partitions=4,
        own_workers=False,
        consumers=arguments.consumers,
        latency=0.0,
        unfollowed=0.0,
        newcomers=None,
        has_clocks=False,
        verifies=True,
    )
    async with World(small_disks=False) as world:
        soak = Soak(
            world,
            plan,
            folder,
            minutes=arguments.soak,
            rows_per_second=arguments.rate,
            spared=frozenset(arguments.spare),
        )
        outcome = await soak.run()
        _report(outcome, world, folder)
    print(json.dumps(soak.samples.summary(), indent=1))
    found = {"at": time.strftime("%F %T"), "minutes": arguments.soak, **soak.samples.summary(), **outcome.as_dict()}
    journal.append(arguments.log or arguments.folder / "soaks.jsonl", found)
    return 0 if outcome.verdict == "ok" else 1


async def _main(arguments: argparse.Namespace) -> int:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    log: Path = arguments.log or arguments.folder / "rounds.jsonl"
    if arguments.summary:
        print(journal.summary(journal.read(log)))
        return 0
    done = set() if arguments.again else journal.passed_seeds(log)
    seeds = [seed for seed in range(arguments.seed, arguments.seed + arguments.rounds) if seed not in done]
    began, failed = time.monotonic(), 0
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    if arguments.soak is not None:
        return await _soak(arguments)
    async with World() as world:
        for seed in seeds:
            if arguments.minutes is not None and time.monotonic() - began > arguments.minutes * 60:
                break
            folder = arguments.folder / f"seed-{seed}-{time.strftime('%d%H%M%S')}"
            outcome = await Round(world, make_plan(seed), folder).run()
            _report(outcome, world, folder)
            journal.append(log, {"at": time.strftime("%F %T"), **outcome.as_dict()})
            await world.drop_databases(f"chaos_{seed}")
            failed += outcome.verdict != "ok"
            if failed and arguments.stop:
                break
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    enter_namespace()
    try:
        sys.exit(asyncio.run(_main(_arguments())))
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.exit(130)
