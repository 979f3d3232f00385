"""What `validate` judges: facts about both servers and the broker in, findings out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from live_migration.common.progress import format_number_of, name_list

OLDEST_MAJOR = 14
NEWEST_MAJOR = 18


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that validation found. An error forbids the migration; `hint` says what to do."""

    level: Literal["error", "warning"]
    what: str
    hint: str = ""


def error(what: str, hint: str = "") -> Finding:
    """Give a finding that forbids the migration."""
    return Finding("error", what, hint)


def warning(what: str, hint: str = "") -> Finding:
    """Give a finding that the user should know of."""
    return Finding("warning", what, hint)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What either server says of itself and of the database. Sizes in bytes, -1 and 0 as the server means them."""

    version: int
    """As `server_version_num`."""
    system_identifier: str
    started_at: str
    database: str
    encoding: str
    is_standby: bool
    is_read_only: bool

    @property
    def major(self) -> int:
        """The major version."""
        return self.version // 10_000


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension of the source. `is_used`: objects of the user's depend on it."""

    name: str
    version: str
    is_used: bool


_PUBLISHED_MEANWHILE = {14: 140_018, 15: 150_013, 16: 160_009, 17: 170_005}
"""By major version the first server that distributes a publication's change to transactions that it decodes at the time (PostgreSQL's
commit 4909b38af0)."""


def assess_server(side: str, facts: ServerFacts) -> list[Finding]:
    """Judge what both servers must be: a supported version and a primary that takes writes."""
    found = []
    if facts.major < OLDEST_MAJOR:
        found.append(
            error(
                f"the {side} runs PostgreSQL {facts.major}; {OLDEST_MAJOR} is the oldest that works",
                f"Upgrade the {side}: binary decoding and logical messages came with {OLDEST_MAJOR}.",
            )
        )
    elif facts.major > NEWEST_MAJOR:
        found.append(
            warning(f"the {side} runs PostgreSQL {facts.major}, newer than {NEWEST_MAJOR}, the newest that was tried")
        )
    if side == "source" and facts.version < (mended := _PUBLISHED_MEANWHILE.get(facts.major, 0)):
        found.append(
            warning(
                f"the source's PostgreSQL {facts.major}.{facts.version % 10_000} is older than {facts.major}.{mended % 10_000}, which mended that changes of a "
                "table could be left out of the stream where it was published while transactions were at work on it",
                f"Update the source to {facts.major}.{mended % 10_000} or newer, or make no tables there during the migration, and run `live-migration verify`.",
            )
        )
    if facts.is_standby:
        found.append(error(f"the {side} is a standby", f"Connect to the {side}'s primary."))
    elif facts.is_read_only:
        found.append(
            error(
                f"sessions on the {side} are read-only (default_transaction_read_only is on)",
                f"Turn it off for the {side}'s role or database.",
            )
        )
    return found


def is_same_database(source: ServerFacts, target: ServerFacts) -> bool:
    """Tell whether both are one database; a clone of a server keeps its system identifier, but not its start."""
    one, other = ((each.system_identifier, each.started_at, each.database) for each in (source, target))
    return one == other


def assess_pair(source: ServerFacts, target: ServerFacts) -> list[Finding]:
    """Judge the target as the source's successor."""
    found = []
    if is_same_database(source, target):
        found.append(error("source and target are the same database", "Check SOURCE and TARGET."))
    if target.major < source.major:
        found.append(
            error(
                f"the target runs PostgreSQL {target.major}, older than the source's {source.major}",
                f"Use a target of version {source.major} or newer.",
            )
        )
    if target.encoding not in (source.encoding, "UTF8"):
        found.append(
            warning(
                f"the target's database has the encoding {target.encoding}, the source's {source.encoding}: "
                "a character that the target lacks would stop the migration",
                "Create the target's database with encoding UTF8.",
            )
        )
    return found


def assess_extensions(extensions: Sequence[Extension], available: frozenset[str]) -> list[Finding]:
    """Judge extensions of the source that the target cannot create."""
    missing = [extension for extension in extensions if extension.name not in available]
    used = [extension.name for extension in missing if extension.is_used]
    unused = [extension.name for extension in missing if not extension.is_used]
    found = []
    if used:
        found.append(
            error(
                f"the target lacks extensions that the source's objects need: {name_list(used)}",
                "Install them on the target's server.",
            )
        )
    if unused:
        found.append(warning(f"extensions of the source are not available on the target: {name_list(unused)}"))
    return found


def assess_conflicts(conflicts: Sequence[str]) -> list[Finding]:
    """Judge what stands on the target where we would create the source's."""
    if not conflicts:
        return []
    return [
        error(
            f"the target is not empty: it holds {format_number_of(len(conflicts), 'object')} that would be created: {name_list(conflicts)}",
            "Migrate into an empty database, or drop these objects if nobody needs them.",
        )
    ]


def assess_leftovers(
    slot: str, *, slot_exists: bool, active_pid: int | None, publications: Sequence[str]
) -> list[Finding]:
    """Judge slot and publications of our name that no state speaks of."""
    found = []
    if active_pid is not None:
        found.append(
            error(
                f"slot {slot} on the source is in use by pid {active_pid}: a migration of this name runs elsewhere",
                "Choose another --name, or stop the other migration and `clean` it.",
            )
        )
    elif slot_exists:
        found.append(
            error(
                f"slot {slot} exists on the source, but the target holds no migration of this name",
                f"It belongs to another migration, or was left: `select pg_drop_replication_slot('{slot}')` "
                "if nobody needs it, else choose another --name.",
            )
        )
    if publications:
        names = name_list(publications)
        found.append(
            error(
                f"publications exist on the source, but the target holds no migration of this name: {names}",
                f"`drop publication {names}` if nobody needs them, else choose another --name.",
            )
        )
    return found


def assess_topics(present: Sequence[str]) -> list[Finding]:
    """Judge topics of our names that no state speaks of."""
    if not present:
        return []
    return [
        error(
            f"topics exist in Kafka already, but the target holds no migration of this name: {name_list(present)}",
            "They may hold another migration's changes. Choose another --name, or delete them if nobody needs them.",
        )
    ]


def assess_brokers(brokers: int, replication_factor: int) -> list[Finding]:
    """Judge whether the cluster can keep what the source lets go of."""
    if replication_factor > brokers:
        return [
            error(
                f"--replication-factor {replication_factor} is more than Kafka's {brokers} brokers",
                "Lower it, or add brokers.",
            )
        ]
    if (replication_factor or brokers) < 3:
        return [
            warning(
                f"the topics have {format_number_of(replication_factor or brokers, 'replica')}: changes that the source has let go of "
                "may be lost with a broker's disk",
                "Three brokers keep them; else be ready to start the migration over.",
            )
        ]
    return []
