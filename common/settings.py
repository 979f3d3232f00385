"""Every setting of the program, read from options and the environment, checked before the first connection.

An option `--part-size` is `LIVE_MIGRATION_PART_SIZE` in the environment; `SOURCE`, `TARGET` and `KAFKA` also stand without
the prefix, as users of the original have them. Sizes are bytes, times are seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from live_migration.common.errors import UsageError
from live_migration.common.lanes import LaneMap, parse_lanes

KIB = 1024
MIB = 1024 * KIB


def _alias(name: str) -> AliasChoices:
    return AliasChoices(name, f"LIVE_MIGRATION_{name}")


class Settings(BaseSettings):
    """One frozen object, passed to whoever needs it."""

    model_config = SettingsConfigDict(
        env_prefix="LIVE_MIGRATION_", frozen=True, extra="ignore", populate_by_name=True, hide_input_in_errors=True
    )

    source: SecretStr | None = Field(None, validation_alias=_alias("SOURCE"))
    """libpq URI of the source database."""
    target: SecretStr | None = Field(None, validation_alias=_alias("TARGET"))
    """libpq URI of the target database; the migration's state lives there, in the schema `_live_migration`."""
    kafka: str | None = Field(None, validation_alias=_alias("KAFKA"))
    """Bootstrap servers, `host:port[,host:port]`; without it `migrate` runs a broker of its own in `dir`."""
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    kafka_username: str | None = None
    kafka_password: SecretStr | None = None
    kafka_ca_file: Path | None = None

    name: str = "live_migration"
    """Names slot, publications, topics and consumer group."""
    dir: Path = Path("live-migration-data")
    """Folder of the broker that `migrate` runs itself, and of logs."""
    pg_bin: Path | None = None
    """Folder of pg_dump and pg_restore; else PATH where new enough, else the installed wheel's."""
    workers: bool = True
    """Whether `migrate` starts producer and consumers itself."""
    consumers: int = Field(2, ge=1, le=64)
    cutover: Literal["ask", "auto"] = "ask"
    replica_identity_full: bool = False
    """Give tables without replica identity `REPLICA IDENTITY FULL` on the source, put back by `clean`."""
    hypertable: Annotated[tuple[str, ...], NoDecode] = ()
    """Tables that become hypertables, each `schema.table:time_column,interval[,partition_column,number]`."""
    hypertables_file: Path | None = None
    """The same, one a line."""
    skip_hypertable_incompatible_objects: bool = False
    """Leave out keys and foreign keys that hypertables cannot have."""
    skip_hypertable_object: Annotated[tuple[str, ...], NoDecode] = ()
    """Those of them that are left out, each `schema.table.name`."""
    pause_source_jobs: bool = False
    """Pause TimescaleDB's jobs on the source that move data, given back by `clean`; else `migrate` asks on a terminal."""
    accept_unseen_changes: bool = False
    """Begin though some changes of compressed chunks cannot be noticed: before TimescaleDB 2.29 without a superuser on the source, and before 2.16."""
    accept_ddl: bool = False
    """Cut over though definitions were changed on the source since the plan that the target has otherwise."""
    flatten: bool = False
    """Let hypertables become plain tables on a target without TimescaleDB."""

    partitions: int = Field(8, ge=1, le=1000)
    """Lanes of the change log; fixed for a migration's life. With 1 the target shows whole source transactions."""
    lanes: Annotated[tuple[str, ...], NoDecode] = ()
    """Tables that have several lanes of their own, rows by key, each `schema.table=number`; fixed for a migration's life."""
    replication_factor: int = Field(0, ge=0)
    """Of the topics; 0: 3, or as many as there are brokers."""
    segment_bytes: int = Field(128 * KIB, ge=4 * KIB, le=900 * KIB)
    """A segment is cut when its body reaches this; longer messages go in fragments of this size."""
    keep_changes: bool = False
    """Keep applied segments in the change topic until `clean`: for a target that may be restored, or fail over."""
    flush_interval: float = Field(0.05, gt=0)
    """Longest time that a received change waits in the producer before it is sent to Kafka; after a flush of 512 KiB, four times that."""
    flush_bytes: int = Field(8 * MIB, ge=64 * KIB)
    """Bytes of segments in one Kafka transaction."""
    status_interval: float = Field(5.0, gt=0)
    """Time between status replies to the walsender; far below its wal_sender_timeout."""
    heartbeat_interval: float = Field(10.0, gt=0)
    """Time between heartbeats that the producer writes into the source's WAL when the source is idle."""
    logical_decoding_work_mem: int = Field(256 * MIB, ge=0, lt=2**41)
    """What the slot's walsender holds of transactions before it writes them to the source's disk; 0, or less than the source has: as the source has it."""

    table_jobs: int = Field(2, ge=1, le=64)
    """Parts that one consumer copies at a time."""
    index_jobs: int = Field(2, ge=1, le=64)
    """Indexes that one consumer builds at a time."""
    part_size: int = Field(512 * MIB, ge=8 * KIB)
    """Tables larger than this are cut into parts of this many bytes of heap."""
    maintenance_work_mem: str = "512MB"
    """For index builds on the target."""
    lock_timeout: float = Field(2.0, gt=0)
    """How long one of our statements waits for a lock on the source before it gives way and tries again."""
    lease: float = Field(15.0, gt=1)
    """How long a claim holds without a renewal; a dead worker's part is taken over after that."""
    slot_timeout: float = Field(600.0, gt=0)
    """How long slot creation waits for transactions that are open on the source."""
    max_slot_lag: int = Field(0, ge=0)
    """WAL that the slot may keep on the source before it is dropped, and the migration stops; 0: no bound."""

    batch_rows: int = Field(100_000, ge=1)
    batch_bytes: int = Field(16 * MIB, ge=64 * KIB)
    """One target transaction applies at most about this much of one lane."""
    memory: int = Field(96 * MIB, ge=8 * MIB)
    """Bytes of segments that one consumer holds over all its lanes."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    @field_validator("hypertable", "skip_hypertable_object", "lanes", mode="before")
    @classmethod
    def _one_a_line(cls, value: object) -> object:
        """Split what the environment gives: one table a line."""
        return tuple(line.strip() for line in value.splitlines() if line.strip()) if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _name_fits_everywhere(cls, name: str) -> str:
        if not (1 <= len(name) <= 40 and name.isascii() and name.replace("_", "a").isalnum() and name == name.lower()):
            raise ValueError("must be 1 to 40 of a-z, 0-9 and _ (it names a replication slot)")
        return name

    @model_validator(mode="after")
    def _lanes_make_sense(self) -> Settings:
        if parse_lanes(self.lanes) and self.partitions == 1:
            raise UsageError(
                "--lanes goes with two --partitions at least",
                hint="With one the target shows whole source transactions, which several lanes cannot.",
            )
        return self

    @property
    def lane_map(self) -> LaneMap:
        """The change log's lanes."""
        return LaneMap(self.partitions, parse_lanes(self.lanes))

    @property
    def slot(self) -> str:
        """Name of the replication slot."""
        return self.name

    @property
    def publication(self) -> str:
        """Name of the publication of tables with a replica identity: all changes."""
        return self.name

    @property
    def insert_publication(self) -> str:
        """Name of the publication of tables without replica identity: inserts and truncates."""
        return f"{self.name}_insert"

    @property
    def changes_topic(self) -> str:
        """Name of the change log's topic."""
        return f"{self.name}.changes"

    @property
    def control_topic(self) -> str:
        """Name of the compacted topic that producer and coordinator talk over."""
        return f"{self.name}.control"

    @property
    def dead_letter_topic(self) -> str:
        """Name of the topic that keeps the changes which were skipped."""
        return f"{self.name}.dead-letter"

    def source_uri(self) -> str:
        """Give the source's URI. Raises UsageError when there is none."""
        return _required(self.source, "source")

    def target_uri(self) -> str:
        """Give the target's URI. Raises UsageError when there is none."""
        return _required(self.target, "target")

    def kafka_servers(self) -> str:
        """Give the bootstrap servers. Raises UsageError when there are none."""
        if not self.kafka:
            raise UsageError("no broker is given", hint="Give --kafka HOST:PORT or set KAFKA.")
        return self.kafka

    def environment(self) -> dict[str, str]:
        """Give the settings as environment variables for a child process, secrets included."""
        variables = {}
        for field in type(self).model_fields:
            value = getattr(self, field)
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            if isinstance(value, tuple):
                value = "\n".join(value)
            if value is not None:
                variables[f"LIVE_MIGRATION_{field.upper()}"] = str(value)
        return variables


def _required(secret: SecretStr | None, what: str) -> str:
    if secret is None:
        raise UsageError(
            f"no {what} is given", hint=f"Give --{what} postgresql://… or set {what.upper()} in the environment."
        )
    return secret.get_secret_value()


def load_settings(options: dict[str, Any]) -> Settings:
    """Merge options (None: not given) over the environment over defaults.

    Raises:
        UsageError: names every wrong setting at once, without its value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc'])).lower()}: {e['msg']}" for e in error.errors(include_input=False)
        )
        raise UsageError(f"wrong settings: {wrong}", hint="`live-migration --help` lists the settings.") from None
