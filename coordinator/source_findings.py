"""What `validate` judges of the source alone: whether it can be decoded, the role's rights, its tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from live_migration.common.catalog import TableInfo
from live_migration.common.progress import format_bytes, format_duration, format_number_of, name_list
from live_migration.common.relation import ReplicaIdentity
from live_migration.coordinator.findings import Finding, error, warning

_SMALL_WAL_BYTES = 4 << 30
_REPLIES_PER_TIMEOUT = 4


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What logical decoding on the source depends on."""

    wal_level: str
    slots: int
    max_slots: int
    senders: int
    max_senders: int
    max_slot_wal_keep_bytes: int
    wal_sender_timeout_ms: int
    idle_slot_timeout: str
    database_bytes: int
    tables: int
    """Chunks of hypertables and their compressed tables included."""
    locks: int
    """What all sessions can hold together."""


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """What the source's role may do."""

    name: str
    is_superuser: bool
    can_replicate: bool
    """REPLICATION attribute, or member of a managed service's replication role."""
    can_create: bool
    """CREATE on the database, which publications need."""
    not_owned: tuple[str, ...]
    not_readable: tuple[str, ...]
    row_secured: tuple[str, ...]
    """Tables whose row security would hide rows from the role."""


@dataclass(frozen=True, slots=True)
class PreparedTransaction:
    """A two-phase transaction that waits for its end."""

    gid: str
    age_seconds: float


def assess_source(facts: SourceFacts, encoding: str, status_interval: float) -> list[Finding]:
    """Judge whether the source can be decoded."""
    found = []
    if facts.wal_level != "logical":
        found.append(
            error(
                f"the source has wal_level={facts.wal_level}, it must be logical",
                "`alter system set wal_level = logical` and restart the source; on RDS: rds.logical_replication=1.",
            )
        )
    if facts.slots >= facts.max_slots:
        found.append(
            error(
                f"the source has no free replication slot ({facts.slots} of {facts.max_slots} are taken)",
                "Drop a slot that nobody needs (pg_replication_slots) or raise max_replication_slots and restart.",
            )
        )
    if facts.senders >= facts.max_senders:
        found.append(
            error(
                f"the source has no free walsender ({facts.senders} of {facts.max_senders} are taken)",
                "Raise max_wal_senders and restart, or end a standby's connection (pg_stat_replication).",
            )
        )
    if encoding == "SQL_ASCII":
        found.append(
            error(
                "the source's database has the encoding SQL_ASCII, whose bytes need not be text at all",
                "Dump it, find its true encoding, and load it into a database that has it.",
            )
        )
    return found + assess_locks("source", facts.tables, facts.locks) + _assess_slot_limits(facts, status_interval)


def assess_locks(side: str, tables: int, locks: int) -> list[Finding]:
    """Judge a server's shared table of locks: pg_dump locks all tables at once, and a statement on a hypertable all of its chunks.

    Who fills it has everybody's statements fail.
    """
    if tables * 2 <= locks:
        return []
    what = f"the source has {format_number_of(tables, 'table')}, chunks included; the {side}'s sessions can hold about {format_number_of(locks, 'lock')} together"
    hint = f"Raise max_locks_per_transaction on the {side} and restart it."
    if tables > locks:
        return [error(f"{what}: locking all at once would fail, and others' statements beside it", hint)]
    return [warning(f"{what}: that may not be enough beside other work", hint)]


def _assess_slot_limits(facts: SourceFacts, status_interval: float) -> list[Finding]:
    found = []
    if 0 <= facts.max_slot_wal_keep_bytes < max(_SMALL_WAL_BYTES, facts.database_bytes):
        found.append(
            warning(
                f"max_slot_wal_keep_size on the source is {format_bytes(facts.max_slot_wal_keep_bytes)}: "
                "if the producer falls behind by more, the source removes WAL it needs and the migration starts over",
                "Raise it for the time of the migration, or set it to -1 and watch the source's disk.",
            )
        )
    if 0 < facts.wal_sender_timeout_ms < _REPLIES_PER_TIMEOUT * status_interval * 1000:
        found.append(
            warning(
                f"wal_sender_timeout on the source is {facts.wal_sender_timeout_ms} ms, short beside our status "
                f"interval of {status_interval:g} s",
                "Set it to 60s or more, or lower --status-interval.",
            )
        )
    if facts.idle_slot_timeout not in ("", "0"):
        found.append(
            warning(
                f"idle_replication_slot_timeout on the source is {facts.idle_slot_timeout}: a producer that is away "
                "for longer loses its slot",
                "Set it to 0 for the time of the migration.",
            )
        )
    return found


def assess_role(facts: RoleFacts, database: str) -> list[Finding]:
    """Judge the rights of the source's role, each that is missing by its name."""
    if facts.is_superuser:
        return []
    found = []
    role = facts.name
    if not facts.can_replicate:
        found.append(
            error(
                f"role {role} on the source lacks the REPLICATION attribute",
                f"`alter role {role} replication`; on RDS: `grant rds_replication to {role}`.",
            )
        )
    if not facts.can_create:
        found.append(
            error(
                f"role {role} on the source lacks CREATE on database {database}, which publications need",
                f"`grant create on database {database} to {role}`.",
            )
        )
    if facts.not_owned:
        found.append(
            error(
                f"role {role} on the source does not own {format_number_of(len(facts.not_owned), 'table')}, and only an owner can publish: "
                f"{name_list(facts.not_owned)}",
                f"Make {role} a member of the owning roles, or connect as a superuser.",
            )
        )
    if facts.not_readable:
        found.append(
            error(
                f"role {role} on the source lacks SELECT on: {name_list(facts.not_readable)}",
                f"`grant pg_read_all_data to {role}`.",
            )
        )
    if facts.row_secured:
        found.append(
            error(
                f"row security would hide rows from role {role} on the source in: {name_list(facts.row_secured)}",
                f"`alter role {role} bypassrls`, or connect as a superuser.",
            )
        )
    return found


def assess_tables(tables: Sequence[TableInfo], *, replica_identity_full: bool) -> list[Finding]:
    """Name the tables that cannot be followed like others."""
    found = []
    without = [
        table.name
        for table in tables
        if table.persistence == "p" and table.identity is not ReplicaIdentity.FULL and table.identity_index is None
    ]
    if without and replica_identity_full:
        found.append(
            warning(
                f"REPLICA IDENTITY FULL is given until `clean` to {format_number_of(len(without), 'table')} without an identity: "
                f"{name_list(without)}"
            )
        )
    elif without:
        found.append(
            warning(
                f"{format_number_of(len(without), 'table')} without replica identity, where only INSERT and TRUNCATE are followed: "
                f"{name_list(without)}",
                "Give them a primary key, or use --replica-identity-full, if rows are updated or deleted there.",
            )
        )
    full = [t.name for t in tables if t.identity is ReplicaIdentity.FULL and any(c.generated for c in t.columns)]
    if full:
        found.append(
            warning(
                f"tables with REPLICA IDENTITY FULL and a generated column refuse UPDATE and DELETE once published; "
                f"only INSERT and TRUNCATE on them are followed: {name_list(full)}",
                "Give them a primary key or a unique index as replica identity.",
            )
        )
    unlogged = [table for table in tables if table.persistence == "u"]
    if unlogged:
        size = format_bytes(sum(table.size_bytes for table in unlogged))
        found.append(
            warning(
                f"{format_number_of(len(unlogged), 'unlogged table')} ({size}), not in the WAL, to be copied at the cutover: "
                f"{name_list(table.name for table in unlogged)}"
            )
        )
    return found


def assess_short_names(tables: Sequence[TableInfo], encoding: str, target_encoding: str) -> list[Finding]:
    """Name columns of fixed length in bytes, whose values may need more of them in the target's encoding, and are then cut without a word."""
    if encoding in ("UTF8", target_encoding):
        return []
    short = [
        f"{table.name}.{column.name}"
        for table in tables
        for column in table.columns
        if (column.base_type or column.type).removesuffix("[]") in ("name", '"char"')
    ]
    if not short:
        return []
    return [
        warning(
            f'columns of type name hold 63 bytes and of type "char" one, and {encoding}\'s characters beyond ASCII take more of them in {target_encoding}: '
            f"values that do not fit are cut on the target: {name_list(short)}",
            "Make them text on the source, if they hold such characters.",
        )
    ]


def assess_large_objects(count: int, size_bytes: int) -> list[Finding]:
    """Announce what is copied at the cutover, within the downtime."""
    if not count:
        return []
    return [
        warning(
            f"{format_number_of(count, 'large object')} ({format_bytes(size_bytes)}), not in the stream, to be copied at the cutover"
        )
    ]


def assess_prepared(transactions: Sequence[PreparedTransaction]) -> list[Finding]:
    """Name what the creation of the slot would wait for."""
    if not transactions:
        return []
    names = name_list(f"{t.gid} (prepared {format_duration(round(t.age_seconds))} ago)" for t in transactions)
    return [
        warning(
            f"the slot cannot be made before prepared transactions have ended: {names}",
            "`commit prepared` or `rollback prepared` them.",
        )
    ]
