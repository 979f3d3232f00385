"""`skip`: the user gives up one change that the target refuses; and what was skipped, for reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

import asyncpg
import orjson

from live_migration.common import state
from live_migration.common.errors import TargetError, UsageError
from live_migration.common.lsn import Lsn
from live_migration.common.postgres import asking, session
from live_migration.common.progress import format_number_of
from live_migration.common.segment import Position
from live_migration.common.settings import Settings
from live_migration.common.state import Phase
from live_migration.coordinator.run import APPLICATION

_MOST_NAMED = 20

_STOPPED = "select error, refused from _live_migration.checkpoints where lane = $1 for update"

_REQUEST = """
    insert into _live_migration.skips (lane, commit_lsn, ordinal, relation, kind, reason)
    values ($1, $2::text::pg_lsn, $3, $4, $5, $6) on conflict do nothing
"""

_SKIPS = """
    select s.lane, s.commit_lsn - '0/0'::pg_lsn as lsn, s.ordinal, s.relation, s.kind, s.reason, s.requested_at, s.skipped_at,
           (s.commit_lsn, s.ordinal) <= (c.commit_lsn, c.ordinal) as is_passed
    from _live_migration.skips s join _live_migration.checkpoints c using (lane)
    order by s.requested_at, s.lane, s.commit_lsn, s.ordinal
"""


@dataclass(frozen=True, slots=True)
class Skip:
    """A change that the user gave up, which stands in no table of the target.

    `state`: `skipped`; `requested`, and the lane has not come to it yet; `applied`, for the target could take it after all.
    """

    lane: int
    position: str
    relation: str
    kind: str
    reason: str
    state: str
    requested_at: datetime
    skipped_at: datetime | None


async def request_skip(settings: Settings, lane: int, position: Position) -> str:
    """Ask for a lane's change to be passed over; gives what to tell the user.

    Raises:
        TargetError: the lane does not stand stopped at exactly this change, or the migration is done.
    """
    async with session(settings.target_uri(), "target", application=f"{APPLICATION} skip") as target:
        with asking("target", f"asking to skip {position} in lane {lane}"):
            migration = await state.require_migration(target)
            if migration.phase is Phase.DONE:
                raise TargetError("the migration is done already: the target is in charge")
            async with target.transaction():
                await target.execute("set local lock_timeout = '5s'")
                row = await target.fetchrow(_STOPPED, lane)
                if row is None:
                    raise TargetError(
                        f"the migration has no lane {lane}", hint=f"Its lanes are 0 to {migration.lane_count - 1}."
                    )
                refused = _require_stopped_at(lane, position, row["error"], row["refused"])
                status = await target.execute(
                    _REQUEST,
                    lane,
                    str(Lsn(position.commit_lsn)),
                    position.ordinal,
                    *(refused[name] for name in ("relation", "kind", "reason")),
                )
    what = f"the {refused['kind']} of {refused['relation']} at {position}"
    if status != "INSERT 0 1":
        return f"{what} is asked to be skipped already; lane {lane} does so at its next attempt, once a consumer runs"
    return (
        f"lane {lane} will skip {what} at its next attempt, within seconds of a running consumer; "
        f"the row then stands in the topic {migration.name}.dead-letter: `live-migration tail --dead-letters`"
    )


def parse_position(text: str) -> Position:
    """Read a position as errors print it. Raises UsageError where it is none."""
    try:
        return Position.parse(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is not a change's position", hint="Give it as the error prints it, like 16/B374D848#12."
        ) from None


def _require_stopped_at(lane: int, position: Position, error: str | None, refused: str | None) -> dict[str, str]:
    if error is None:
        raise TargetError(
            f"lane {lane} is not stopped: nothing can be skipped there",
            hint="`live-migration status` shows where each lane stands.",
        )
    if refused is None:
        raise TargetError(
            f"lane {lane} is stopped, but at nothing that could be skipped: {error}",
            hint="When a lane stopped just now, ask `live-migration status` again in a few seconds.",
        )
    found: dict[str, str] = orjson.loads(refused)
    if found["position"] != str(position):
        raise TargetError(
            f"lane {lane} does not stand at {position} but at {found['position']}, the {found['kind']} of {found['relation']}: "
            f"{found['reason']}",
            hint=f"To skip that one: live-migration skip --lane {lane} --position '{found['position']}'",
        )
    return found


async def read_skips(target: asyncpg.Connection) -> tuple[Skip, ...]:
    """Give all skips in the order in which they were asked for; none where the target holds no migration."""
    if not await target.fetchval("select to_regclass('_live_migration.skips') is not null"):
        return ()
    return tuple(
        Skip(
            row["lane"],
            str(Position(int(row["lsn"]), row["ordinal"])),
            row["relation"],
            row["kind"],
            row["reason"],
            "skipped" if row["skipped_at"] else "applied" if row["is_passed"] else "requested",
            row["requested_at"],
            row["skipped_at"],
        )
        for row in await target.fetch(_SKIPS)
    )


def describe_skips(skips: Sequence[Skip]) -> list[str]:
    """Say in lines which changes the target lacks because they were skipped, and which are about to be; none where there are none."""
    skipped = [skip for skip in skips if skip.state == "skipped"]
    lines = []
    if skipped:
        relations = ", ".join(f"{name} {count}" for name, count in Counter(skip.relation for skip in skipped).items())
        lines.append(
            f"{format_number_of(len(skipped), 'change')} skipped on request, which the target lacks: {relations}; "
            "`live-migration tail --dead-letters` prints them"
        )
    pending = [skip for skip in skips if skip.state == "requested"]
    for skip in [*skipped, *pending][:_MOST_NAMED]:
        verb = "skipped" if skip.state == "skipped" else "to be skipped"
        lines.append(f"  {verb}: {skip.kind} of {skip.relation} at {skip.position} in lane {skip.lane}: {skip.reason}")
    if (more := len(skipped) + len(pending) - _MOST_NAMED) > 0:
        lines.append(f"  and {more} more: `live-migration status --json` names all")
    return lines


def skips_as_dicts(skips: Sequence[Skip]) -> list[dict[str, object]]:
    """Give skips for JSON."""
    return [asdict(skip) for skip in skips]
