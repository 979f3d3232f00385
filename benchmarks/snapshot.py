"""Cases of the other form: a whole database is copied, indexes included, into an empty one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.comparing import compare_rows
from benchmarks.results import CaseResult, Entry, Plan, Round
from benchmarks.servers import WHEEL_MAJOR, Servers, execute, running_servers, server_version


@dataclass(frozen=True)
class Database:
    """What is copied: statements that make and fill it, its tables, and how many rows they hold."""

    statements: tuple[str, ...]
    tables: tuple[str, ...]
    rows: int


class Copier(Protocol):
    """Who takes part."""

    name: str
    copies_rows: bool

    def version(self, server: str) -> str:
        """Name program and version, given the server's version."""

    async def copy(self, servers: Servers, rows: int) -> Round:
        """Copy the source's database to the empty target, and measure it."""

    async def clean(self, servers: Servers) -> None:
        """Give back what was changed on the source."""


async def measure_snapshot(
    name: str, about: str, plan: Plan, database: Database, copiers: Sequence[Copier], *, major: int = WHEEL_MAJOR
) -> CaseResult:
    """Run the rounds, the contestants in turn, on the same servers, to a new database each time; compare all rows each time."""
    result = CaseResult(name, about, [Entry(each.name) for each in copiers])
    async with running_servers(major=major, with_kafka=True) as servers:
        await execute(servers.source_uri, *database.statements, "vacuum analyze")
        version = await server_version(servers.source_uri)
        stands = list(zip(result.entries, copiers, strict=True))
        for number in range(1, plan.rounds + plan.warm_up + 1):
            for entry, copier in stands if number % 2 else reversed(stands):
                entry.version = copier.version(version)
                await servers.recreate_target()
                await servers.checkpoint()
                measured = await copier.copy(servers, database.rows)
                is_counted = number > plan.warm_up
                print(f"  {name}: {entry.contestant} {measured.seconds:.2f} s{'' if is_counted else ' (warm-up)'}")
                if copier.copies_rows:
                    await compare_rows(servers, database.tables, who=entry.contestant)
                await copier.clean(servers)
                if is_counted:
                    entry.rounds.append(measured)
    return result
