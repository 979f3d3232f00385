"""Running an archive's entries on the target, in batches whose progress is committed with them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import asyncpg

from live_migration.common.errors import TargetError
from live_migration.common.postgres import refusal_of
from live_migration.coordinator import steps
from live_migration.coordinator.dump_script import Entry
from live_migration.coordinator.run import Run

_BATCH = 200
"""Entries in one transaction: few enough for max_locks_per_transaction."""
_OPTIONAL = frozenset({"SECURITY LABEL", "CHUNK OF"})
"""What is done without: a chunk that cannot be made with the source's bounds is made by the first row in it."""
_PRIVILEGED = frozenset({"EVENT TRIGGER", "PUBLICATION", "PUBLICATION TABLES IN SCHEMA"})
"""What a role that is no superuser may be refused, whoever owns the database, and is done without then: no row depends on it."""
UNFIT = (
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedObjectError,
    asyncpg.UndefinedFunctionError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.InvalidForeignKeyError,
    asyncpg.DuplicateObjectError,
    asyncpg.DuplicateTableError,
)
"""What the target says where it lacks what a statement names, or has it already: somebody altered one side since the statement was written."""

Renew = Callable[[Entry, asyncpg.PostgresError], Awaitable[Sequence[str] | None]]
"""Gives the statements by which an entry that was refused is made as the source has it now: none where it is gone, None where it is as it was."""


async def run_entries(
    run: Run, step: str, entries: Sequence[Entry], *, is_late: bool = False, renew: Renew | None = None
) -> None:
    """Run what of the entries is not done yet, in order; afterwards the step is done.

    `entries` must be the same at each call for a step: progress is a number. `is_late`: users wait, and what the target
    cannot make as it is by now is named and left out. `renew`: is asked about an entry that the target refuses.

    Raises:
        TargetError: names the object that cannot be made; what came before it stays.
    """
    if await steps.is_done(run.target, step):
        return
    done = await steps.progress(run.target, step)
    while done < len(entries):
        batch = entries[done : done + _BATCH]
        # When one entry of a batch fails, those before it are kept: the next attempt begins at the culprit.
        made, failure = await _run_batch(run, step, done, batch, is_late, renew)
        done += made
        if failure is not None:
            raise failure
    async with run.target_transaction(f"ending {step}"):
        await steps.finish(run.target, run.epoch, step)


async def _run_batch(
    run: Run, step: str, done: int, batch: Sequence[Entry], is_late: bool, renew: Renew | None
) -> tuple[int, TargetError | None]:
    async with run.target_transaction(step):
        await run.target.execute("set local check_function_bodies = off")
        await run.target.execute("set local client_min_messages = warning")
        if await _run_together(run, batch):
            made, failure = len(batch), None
        else:
            made, failure = await _run_one_by_one(run, batch, is_late, renew)
        await steps.advance(run.target, run.epoch, step, done + made)
    return made, failure


async def _run_together(run: Run, batch: Sequence[Entry]) -> bool:
    """Run entries as one script, which takes the server's time alone, and tell whether that went well; else nothing is kept."""
    if any(_may_be_there(entry) for entry in batch):
        return False
    script = []
    in_force: tuple[tuple[str, str], ...] = ()
    for entry in batch:
        if entry.defaults != in_force:
            script += [f"set local {name} = {value}" for name, value in entry.defaults]
            in_force = entry.defaults
        script.append(entry.statements)
    try:
        async with run.target.transaction():
            await run.target.execute("\n;\n".join(script))
    except asyncpg.PostgresError as error:
        refusal_of(error)  # what is wrong with the session is raised
        return False
    return True


async def _run_one_by_one(
    run: Run, batch: Sequence[Entry], is_late: bool, renew: Renew | None
) -> tuple[int, TargetError | None]:
    """Run entries up to the first that fails; give how many were run, and what is said of that one."""
    made = 0
    in_force: tuple[tuple[str, str], ...] = ()
    for entry in batch:
        if entry.defaults != in_force:
            for name, value in entry.defaults:
                await run.target.execute(f"set local {name} = {value}")
            in_force = entry.defaults
        if (failure := await _run_entry(run, entry, is_late, renew)) is not None:
            return made, failure
        made += 1
    return made, None


async def _run_entry(run: Run, entry: Entry, is_late: bool, renew: Renew | None) -> TargetError | None:
    if not entry.statements or await _is_there_already(run, entry):
        return None
    try:
        async with run.target.transaction():
            await run.target.execute(entry.statements)
    except asyncpg.PostgresError as error:
        refusal = refusal_of(error)
        if _is_done_without(entry, error):
            run.reporter.warning(f"{entry.label} is not restored: {refusal}")
            return None
        if is_late and isinstance(error, UNFIT):
            run.reporter.warning(f"{entry.label} is not restored: {refusal}. Make it by hand: {entry.statements}")
            return None
        now = await renew(entry, error) if renew is not None else None
        if now is not None:
            return await _run_renewed(run, entry, now, refusal)
        return TargetError(
            f"target: cannot make {entry.label}: {refusal} [SQLSTATE {error.sqlstate}]",
            hint=error.hint or "Mend the target so that this can be made, then run `live-migration migrate` again.",
        )
    return None


async def _run_renewed(run: Run, entry: Entry, statements: Sequence[str], refusal: str) -> TargetError | None:
    if not statements:
        run.reporter.warning(f"{entry.label} is left out, which the source has no more: {refusal}")
        return None
    run.reporter.note(f"{entry.label} is made as the source has it by now: {statements[0]}")
    return await _run_entry(run, replace(entry, statements=";\n".join(statements)), False, None)


def _is_done_without(entry: Entry, error: asyncpg.PostgresError) -> bool:
    if entry.type == "COMMENT":
        may_be_absent = entry.name.startswith(("EVENT TRIGGER ", "PUBLICATION ", "CONSTRAINT "))  # as a foreign key
        is_absent = may_be_absent and isinstance(error, asyncpg.UndefinedObjectError)
        return is_absent or entry.name.startswith("EXTENSION ")
    is_refused = isinstance(error, asyncpg.InsufficientPrivilegeError)
    return entry.type in _OPTIONAL or (entry.type in _PRIVILEGED and is_refused)


def _may_be_there(entry: Entry) -> bool:
    """Tell whether an entry is of a kind that a new database may hold already, or that the target cannot have."""
    return entry.type in ("SCHEMA", "EXTENSION") or (entry.type == "COMMENT" and entry.name.startswith("EXTENSION "))


async def _is_there_already(run: Run, entry: Entry) -> bool:
    """Tell whether a new database holds it, or the target cannot have it: of the kinds of which `_may_be_there` tells."""
    if entry.type == "SCHEMA":
        return await _has_row(run, "select true from pg_namespace where nspname = $1", entry.name)
    if entry.type == "EXTENSION" and not await _has_row(
        run, "select true from pg_available_extensions where name = $1", entry.name
    ):
        run.reporter.warning(f"extension {entry.name} is not available on the target and is left out")
        return True
    if entry.type == "COMMENT" and entry.name.startswith("EXTENSION "):
        extension = entry.name.removeprefix("EXTENSION ").strip('"')
        return not await _has_row(run, "select true from pg_extension where extname = $1", extension)
    return False


async def _has_row(run: Run, query: str, name: str) -> bool:
    return bool(await run.target.fetchval(query, name))
