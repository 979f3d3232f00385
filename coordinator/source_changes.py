"""DDL on the source since the plan that the stream does not carry: found, named, and brought where it comes at the hand-over anyway.

The plan keeps what every table, view, function and type was like; what is otherwise by the cutover, and is not so on the target, was
changed meanwhile. Foreign keys, triggers, rules, policies and row security are made at the hand-over as the source has them by then.
The rest is the user's: the cutover is refused once with its statements, and goes on with `--accept-ddl`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import asyncpg

from live_migration.common.errors import ConnectionLost, SourceError, TargetError
from live_migration.common.postgres import LOCKED, asking
from live_migration.common.progress import name_list
from live_migration.coordinator import archives, steps
from live_migration.coordinator.definitions import (
    ARCHIVE,
    LATE,
    Definition,
    decode,
    read_definitions_of_all,
    read_some_definitions,
)
from live_migration.coordinator.dump_script import Entry
from live_migration.coordinator.run import Run

FILE = "changed-on-source.sql"
_LATE_CHANGES = "late changes"
_LAST_SECONDS = 30.0
_PAUSE_SECONDS = 2.0
_OTHERS = frozenset({"foreign key"})
"""Have a plan of their own: see `foreign_keys`."""


@dataclass(frozen=True, slots=True)
class Change:
    """One object that the source has otherwise than at the plan: `before` is None of a new one, `now` of one that is gone."""

    before: Definition | None
    now: Definition | None

    @property
    def kind(self) -> str:
        return self._one.kind

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self._one.key

    @property
    def label(self) -> str:
        """What people know it by, and what became of it."""
        became = "is new" if self.before is None else "is gone" if self.now is None else "was altered"
        return f"{self._one.label} {became}"

    @property
    def statements(self) -> list[str]:
        """The statements that bring it to the target; those that take something away name what the target is to have no more."""
        if self.now is None:
            return [self._one.gone_by or f"-- {self._one.label} is gone from the source"]
        if self.before is not None and self.now.kind == "type":
            return [f"-- {self.now.label} was altered with ALTER; it is now: {self.now.made_by}"]
        is_replaced = self.before is not None and self.now.gone_by and "OR REPLACE" not in self.now.made_by[:20]
        return [*([self.now.gone_by] if is_replaced else []), self.now.made_by]

    @property
    def _one(self) -> Definition:
        one = self.now or self.before
        assert one is not None
        return one


def compare_definitions(before: Sequence[Definition], now: Sequence[Definition]) -> list[Change]:
    """Give what is new, gone or altered; nothing of tables that are themselves new, or gone, for these are followed as such. Pure."""
    then, today = ({each.key: each for each in some} for some in (before, now))
    known, present = ({each.table for each in some} | {0} for some in (before, now))
    changes = [
        Change(then.get(key), each)
        for key, each in today.items()
        if each.table in known and (key not in then or then[key].definition != each.definition)
    ]
    gone = [
        Change(each, None)
        for key, each in then.items()
        if key not in today and each.table in present and each.kind != "column"
    ]
    return [*changes, *gone]


def lacking(changes: Iterable[Change], there: Sequence[Definition]) -> list[Change]:
    """Give the changes that the target does not show. Pure."""
    theirs = {each.key: each.definition for each in there}
    return [each for each in changes if theirs.get(each.key) != (each.now.definition if each.now else None)]


async def find_changes(
    run: Run, source: asyncpg.Connection, target: asyncpg.Connection, *, kinds: Collection[str] = ()
) -> list[Change] | None:
    """Compare the source with the plan, in these `kinds` or in all; None where the plan was made by a version that kept nothing of it."""
    planned = await _read_planned(target)
    return None if planned is None else await _compare_now(run, source, planned, kinds)


async def _read_planned(target: asyncpg.Connection) -> list[Definition] | None:
    with asking("target", "reading the plan"):
        content = await archives.read(target, ARCHIVE)
    return None if content is None else await asyncio.to_thread(decode, content)


async def _compare_now(
    run: Run, source: asyncpg.Connection, planned: Sequence[Definition], kinds: Collection[str]
) -> list[Change]:
    now = await run.patiently("reading definitions", lambda: read_definitions_of_all(source, kinds=kinds))
    return compare_definitions([each for each in planned if not kinds or each.kind in kinds], now)


async def find_lacking(
    run: Run,
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    *,
    without: Collection[str] = LATE,
    is_patient: bool = True,
) -> list[Change]:
    """Give what was changed on the source since the plan and is not so on the target, `without` some kinds.

    Args:
        run: of the coordinator.
        source: a session of the caller's.
        target: another; lanes may be at work there.
        without: see above.
        is_patient: whether it waits for whoever locks what is to be looked at on the target.
    """
    changes = [each for each in await find_changes(run, source, target) or [] if each.kind not in without]
    if not changes:
        return []
    for attempt in count():
        try:
            with asking("target", "reading definitions"):
                there = await read_some_definitions(target, [each.key for each in changes])
            return lacking(changes, there)
        except TargetError as error:
            if not is_patient or not isinstance(error.__cause__, LOCKED):
                raise
        if attempt % 5 == 0:
            run.reporter.note("comparing definitions waits for somebody who locks a table on the target")
        await asyncio.sleep(_PAUSE_SECONDS)
    raise AssertionError


async def name_changes(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> None:
    """Warn of what was changed on the source and is not so on the target, each time that this is otherwise.

    Where somebody locks what is to be looked at, a lane in a long TRUNCATE say, the next look will do.
    """
    try:
        changes = await find_lacking(run, source, target, is_patient=False)
    except TargetError as error:
        if not isinstance(error.__cause__, LOCKED):
            raise
        return
    run.reporter.warn_on_change("source changes", _say(changes) if changes else "")


async def require_consent(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> list[str]:
    """Give what stands in the way of the cutover of what was changed on the source; write its statements into a file."""
    changes = await find_lacking(run, source, target)
    if not changes:
        return []
    path = await asyncio.to_thread(_write, run.settings.dir, changes)
    said = f"{_say(changes)}. Statements, to be looked through and run on the target: {path}"
    if run.settings.accept_ddl:
        run.reporter.warn_on_change("source changes", said)
        return []
    return [f"{said}; or go on without by `live-migration migrate --accept-ddl`"]


async def warn_of_lacking(run: Run) -> None:
    """Name, once the target is in charge, what it has not as the source has it by now; the source may be switched off already."""
    try:
        async with asyncio.timeout(_LAST_SECONDS), run.source_session("definitions") as source:
            changes = await find_lacking(run, source, run.target, without=_OTHERS)
    except (TimeoutError, SourceError, TargetError, ConnectionLost):  # users wait for what follows
        run.reporter.note("what was changed on the source since the plan could not be read once more at the end")
        return
    if not changes:
        return
    try:
        path = await asyncio.to_thread(_write, run.settings.dir, changes)
    except OSError as error:
        run.reporter.warning(
            f"{_say(changes)}. The statements could not be written to {run.settings.dir / FILE}: {error.strerror}"
        )
    else:
        run.reporter.warning(f"{_say(changes)}. Run on the target what you want of {path}")


def _say(changes: Sequence[Change]) -> str:
    return (
        f"changed on the source since the plan, and not so on the target: {name_list(each.label for each in changes)}"
    )


def _write(folder: Path, changes: Sequence[Change]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    lines = [line for each in changes for line in (f"-- {each.label}", *(f"{part};" for part in each.statements), "")]
    with open(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return path


@dataclass(frozen=True, slots=True)
class LateChanges:
    """Triggers, rules, policies and row security to be made otherwise than the plan says.

    `left_out`: (catalog, oid) of the plan's archive entries that are not run; `made`: (label, statement) to be run after the others.
    """

    left_out: frozenset[tuple[int, int]] = frozenset()
    made: tuple[tuple[str, str], ...] = ()

    def to_run(self, entries: Iterable[Entry]) -> list[Entry]:
        """Give the archive's entries that are run."""
        return [each for each in entries if (each.catalog, each.oid) not in self.left_out]


async def fix_late_changes(run: Run, source: asyncpg.Connection, *, before: str) -> LateChanges:
    """Find what is made otherwise than planned, and keep it: the steps from `before` on must find the same after a crash."""
    with asking("target", "reading the plan"):
        content = await archives.read(run.target, _LATE_CHANGES)
        has_begun = await steps.is_done(run.target, before) or await steps.progress(run.target, before) > 0
    if content is not None:
        kept = json.loads(content)
        return LateChanges(
            frozenset((catalog, oid) for catalog, oid in kept["left_out"]), tuple((a, b) for a, b in kept["made"])
        )
    found = LateChanges()
    if not has_begun:  # by a version without this, whose progress counts all entries
        found = _sort_late(await find_changes(run, source, run.target, kinds=LATE) or [])
    async with run.target_transaction("keeping what is made otherwise than planned") as target:
        kept = {"left_out": sorted(found.left_out), "made": found.made}
        await archives.keep(target, _LATE_CHANGES, json.dumps(kept).encode())
    return found


def _sort_late(changes: Iterable[Change]) -> LateChanges:
    late = [each for each in changes if each.kind in LATE - _OTHERS]
    return LateChanges(
        frozenset((each.before.catalog, each.before.oid) for each in late if each.before and each.before.catalog),
        tuple((each.now.label, each.now.made_by) for each in late if each.now),
    )


async def make_late_changes(run: Run, changes: LateChanges) -> None:
    """Make what is otherwise than planned; what the target refuses is named and left out, for users wait."""
    with asking("target", "reading definitions"):
        there = await read_definitions_of_all(run.target, kinds=LATE - _OTHERS) if changes.made else []
    present = {(each.label, each.made_by) for each in there}
    for label, statement in changes.made:
        if (label, statement) in present:
            continue
        try:
            async with run.target_transaction(f"making {label}") as target:
                await target.execute("set local check_function_bodies = off")
                await target.execute(statement)
        except TargetError as error:
            if not isinstance(error.__cause__, asyncpg.PostgresError):
                raise
            run.reporter.warning(f"{label} is left out: {error.message}. Make it by hand: {statement}")
        else:
            run.reporter.note(f"made as the source has it now: {label}")


async def find_new_foreign_keys(run: Run, source: asyncpg.Connection) -> list[Definition]:
    """Give the foreign keys that were made on the source's planned tables since the plan; not those that got another name."""
    planned = await _read_planned(run.target)
    if planned is None:
        return []
    # Row security is told of each table: by it new tables are known, whose keys are planned with them.
    changes = await _compare_now(run, source, planned, ("foreign key", "row security"))
    new = [each.now for each in changes if each.kind == "foreign key" and each.now and not each.before]
    known = {each.oid for each in planned if each.kind == "foreign key"}
    return [each for each in new if each.oid not in known]
