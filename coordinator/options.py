"""Command-line options, one for each setting that a command uses; what is not given is left to the environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)

_TYPES: dict[str, click.ParamType[Any] | type] = {
    "kafka_security_protocol": click.Choice(["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]),
    "kafka_sasl_mechanism": click.Choice(["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]),
    "kafka_ca_file": _PATH,
    "dir": _PATH,
    "pg_bin": _PATH,
    "hypertables_file": _PATH,
    "cutover": click.Choice(["ask", "auto"]),
    "log_level": click.Choice(["debug", "info", "warning", "error"]),
    "flush_interval": float,
    "status_interval": float,
    "heartbeat_interval": float,
    "lock_timeout": float,
    "lease": float,
    "slot_timeout": float,
    "max_slot_lag": int,
    "consumers": int,
    "partitions": int,
    "replication_factor": int,
    "segment_bytes": int,
    "flush_bytes": int,
    "table_jobs": int,
    "index_jobs": int,
    "part_size": int,
    "batch_rows": int,
    "batch_bytes": int,
    "memory": int,
}

_HELP = {
    "source": "URI of the source database.",
    "target": "URI of the target database, which also holds the migration's state.",
    "kafka": "Kafka's bootstrap servers, host:port[,host:port]. Without it `migrate` runs a broker of its own.",
    "kafka_security_protocol": "How the broker is spoken to.  [default: PLAINTEXT]",
    "kafka_sasl_mechanism": "How we log in to the broker.  [default: SCRAM-SHA-512]",
    "kafka_username": "Our name at the broker.",
    "kafka_password": "Our password at the broker; best given by the environment.",
    "kafka_ca_file": "Certificates that the broker's is checked against.",
    "name": "Names slot, publications, topics and consumer group.  [default: live_migration]",
    "dir": "Folder of our own broker and of logs.  [default: ./live-migration-data]",
    "pg_bin": "Folder of pg_dump and pg_restore.  [default: found on PATH, else the installed wheel's]",
    "workers": "Whether `migrate` starts producer and consumers itself.  [default: --workers]",
    "consumers": "Consumers that `migrate` starts.  [default: 2]",
    "cutover": "Cut over when asked to, or as soon as the target has caught up.  [default: ask]",
    "replica_identity_full": "Give tables without a replica identity REPLICA IDENTITY FULL until `clean`.",
    "hypertable": "A table that becomes a hypertable, 'schema.table:time_column,interval[,partition_column,number]'; repeatable.",
    "hypertables_file": "File of such tables, one a line; # begins a comment line.",
    "skip_hypertable_incompatible_objects": "Leave out keys and foreign keys that hypertables cannot have.",
    "skip_hypertable_object": "Leave out this key or foreign key that hypertables cannot have, 'schema.table.name'; repeatable.",
    "pause_source_jobs": "Pause TimescaleDB's jobs on the source that move data, until `clean`.",
    "accept_unseen_changes": "Begin though some changes of compressed chunks cannot be noticed (an old TimescaleDB, no superuser): `validate` says which.",
    "accept_ddl": "Cut over though DDL on the source since the plan is not on the target; it is named all the same.",
    "flatten": "Let hypertables become plain tables on a target without TimescaleDB.",
    "partitions": "Lanes of the change log, applied in parallel.  [default: 8]",
    "lanes": "A hot table that gets several lanes of its own, rows by key: 'schema.table=number'; repeatable.",
    "replication_factor": "Replicas of the topics; 0: 3, or as many as there are brokers.  [default: 0]",
    "segment_bytes": "Size of a segment of the change log.  [default: 131072]",
    "keep_changes": "Keep applied changes in Kafka until `clean`.  [default: --no-keep-changes]",
    "flush_interval": "Seconds that a change waits in the producer at most.  [default: 0.05]",
    "flush_bytes": "Bytes of segments in one Kafka transaction.  [default: 8388608]",
    "status_interval": "Seconds between replies to the walsender.  [default: 5]",
    "heartbeat_interval": "Seconds between heartbeats in the WAL of an idle source.  [default: 10]",
    "logical_decoding_work_mem": "Bytes of transactions that the source's walsender holds; 0: as the source has it.  [default: 268435456]",
    "table_jobs": "Parts that one consumer copies at a time.  [default: 2]",
    "index_jobs": "Indexes that one consumer builds at a time.  [default: 2]",
    "part_size": "Bytes of heap above which a table is cut into parts.  [default: 536870912]",
    "maintenance_work_mem": "Memory for an index build on the target.  [default: 512MB]",
    "lock_timeout": "Seconds that a statement of ours waits for a lock on the source.  [default: 2]",
    "lease": "Seconds that a claim outlives its worker.  [default: 15]",
    "slot_timeout": "Seconds that the slot's creation waits for open transactions.  [default: 600]",
    "max_slot_lag": "Bytes of WAL that the slot may keep on the source before it is dropped; 0: no bound.  [default: 0]",
    "batch_rows": "Changes that one target transaction applies at most.  [default: 100000]",
    "batch_bytes": "Bytes of changes that one target transaction applies at most.  [default: 16777216]",
    "memory": "Bytes of segments that one consumer holds.  [default: 100663296]",
    "log_level": "What is logged.  [default: info for services, else warning]",
    "log_json": "Log JSON lines.",
}

_OLD_NAMES = frozenset({"source", "target", "kafka"})

LOG = ("log_level", "log_json")
KAFKA = (
    "kafka",
    "kafka_security_protocol",
    "kafka_sasl_mechanism",
    "kafka_username",
    "kafka_password",
    "kafka_ca_file",
)
PRODUCER = (
    "segment_bytes",
    "flush_interval",
    "flush_bytes",
    "status_interval",
    "heartbeat_interval",
    "logical_decoding_work_mem",
)
CONSUMER = (
    "table_jobs",
    "index_jobs",
    "maintenance_work_mem",
    "lock_timeout",
    "lease",
    "batch_rows",
    "batch_bytes",
    "memory",
)
HYPERTABLES = ("hypertable", "hypertables_file", "skip_hypertable_incompatible_objects", "skip_hypertable_object")
CONDUCTOR = (
    "dir",
    "pg_bin",
    "workers",
    "consumers",
    "cutover",
    "replica_identity_full",
    *HYPERTABLES,
    "pause_source_jobs",
    "accept_unseen_changes",
    "accept_ddl",
    "flatten",
    "partitions",
    "lanes",
    "replication_factor",
    "keep_changes",
    "part_size",
    "slot_timeout",
    "max_slot_lag",
)


def variable(field: str) -> str:
    """Give the environment variable of a setting."""
    return field.upper() if field in _OLD_NAMES else f"LIVE_MIGRATION_{field.upper()}"


def settings_options(*fields: str) -> Callable[[Command], Command]:
    """Give a decorator that adds the options of these settings, in this order."""

    def decorate(command: Command) -> Command:
        for field in reversed(fields):
            command = _option(field)(command)
        return command

    return decorate


def _option(field: str) -> Callable[[Command], Command]:
    flag = f"--{field.replace('_', '-')}"
    text = f"{_HELP[field]}  [env: {variable(field)}]"
    if field in ("workers", "keep_changes"):
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", default=None, help=text)
    if field in (
        "replica_identity_full",
        "skip_hypertable_incompatible_objects",
        "pause_source_jobs",
        "accept_unseen_changes",
        "accept_ddl",
        "flatten",
        "log_json",
    ):
        return click.option(flag, is_flag=True, default=None, help=text)
    if field in ("hypertable", "skip_hypertable_object", "lanes"):
        return click.option(flag, multiple=True, callback=_none_if_empty, help=text)
    return click.option(flag, type=_TYPES.get(field, str), default=None, help=text)


def _none_if_empty(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...] | None:
    return values or None  # not given: the environment may say it
