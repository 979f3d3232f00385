"""Hypertables, continuous aggregates and jobs as data, without what only one database knows (ids, internal names). Pure.

Two databases whose definitions are equal partition, compress, aggregate and run jobs alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from live_migration.common.relation import QualifiedName


@dataclass(frozen=True, slots=True)
class Dimension:
    """A column that a hypertable is partitioned by: an open one by `interval`, a closed one into `partitions`.

    `interval`: microseconds for times, else in the column's own unit. `function`: the user's partitioning function, None for
    TimescaleDB's own. `now_function` gives the present time of an integer column.
    """

    column: str
    type: str
    interval: int | None = None
    partitions: int | None = None
    function: QualifiedName | None = None
    now_function: QualifiedName | None = None


@dataclass(frozen=True, slots=True)
class OrderBy:
    """A column that compressed rows are ordered by."""

    column: str
    descending: bool = False
    nulls_first: bool = False


@dataclass(frozen=True, slots=True)
class SparseIndex:
    """What a compressed batch keeps of columns, so that whole batches can be left out: `bloom`, `minmax`, …"""

    type: str
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compression:
    """How chunks are compressed. None: left to TimescaleDB, which decides when it compresses; empty: the user wants none.

    `chunk_interval`: chunks are merged up to this when compressed, in the unit of `Dimension.interval`.
    """

    segment_by: tuple[str, ...] | None = None
    order_by: tuple[OrderBy, ...] | None = None
    chunk_interval: int | None = None
    sparse_indexes: tuple[SparseIndex, ...] | None = None


@dataclass(frozen=True, slots=True)
class Hypertable:
    """A hypertable of a user's; `dimensions` in order, the first is open.

    `chunk_schema` and `chunk_prefix`: None where they are TimescaleDB's own. `skipping`: columns whose range per chunk is kept.
    `extras`: settings that are known by name only.
    """

    name: QualifiedName
    dimensions: tuple[Dimension, ...]
    chunk_schema: str | None = None
    chunk_prefix: str | None = None
    compression: Compression | None = None
    skipping: tuple[str, ...] = ()
    tablespaces: tuple[str, ...] = ()
    has_tiered_chunks: bool = False
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Index:
    """An index on a materialization: `definition` is what follows `ON table`. `name`: None where TimescaleDB chose it."""

    name: str | None
    definition: str
    is_unique: bool = False


@dataclass(frozen=True, slots=True)
class Bucket:
    """How a continuous aggregate cuts time, as the catalog has it; its query says the same."""

    function: str
    width: str
    origin: str | None
    offset: str | None
    timezone: str | None
    is_fixed: bool


@dataclass(frozen=True, slots=True)
class ContinuousAggregate:
    """A continuous aggregate. `query`: its SELECT, every name qualified. `parent`: the hypertable or aggregate it reads.

    `time_column` and `chunk_interval`: those of its materialization, the latter in the unit of `Dimension.interval`. `is_finalized`: False for the format
    of before 2.7. `materialization`: the hypertable that holds its rows on the server that was asked.
    """

    name: QualifiedName
    query: str
    parent: QualifiedName
    materialized_only: bool
    time_column: str
    chunk_interval: int
    bucket: Bucket | None = None
    is_finalized: bool = True
    compression: Compression | None = None
    indexes: frozenset[Index] = frozenset()
    comment: str | None = None
    has_tiered_chunks: bool = False
    extras: tuple[str, ...] = ()
    owner: str = field(default="", compare=False)
    materialization: QualifiedName = field(default=QualifiedName("", ""), compare=False)


@dataclass(frozen=True, slots=True)
class Job:
    """A policy or a user-defined action. Intervals are text in ISO 8601, `initial_start` is text with its offset.

    `relation`: the hypertable or aggregate that it belongs to. `config`: JSON in text, sorted, without ids;
    `id_key` names the key that held one, to be given the id on another server.
    """

    procedure: QualifiedName
    schedule_interval: str
    config: str | None = None
    relation: QualifiedName | None = None
    id_key: str | None = None
    check: QualifiedName | None = None
    is_scheduled: bool = True
    is_fixed_schedule: bool = False
    initial_start: str | None = None
    timezone: str | None = None
    max_runtime: str = "PT0S"
    max_retries: int = -1
    retry_period: str = "PT5M"
    name: str = field(default="", compare=False)
    """For people; releases before 2.20 cannot be told one."""
    owner: str = field(default="", compare=False)
    id: int = field(default=0, compare=False)

    @property
    def is_policy(self) -> bool:
        """Whether it is TimescaleDB's own, not a user's procedure."""
        return is_own_schema(self.procedure.schema)

    def __str__(self) -> str:
        of = f" of {self.relation}" if self.relation else ""
        return f"job {self.id} ({self.procedure.name if self.is_policy else self.procedure}{of})"


@dataclass(frozen=True, slots=True)
class Definitions:
    """All of a database's. `aggregates` are in the order in which they can be made: parents first.

    `version`: of its TimescaleDB. `schema`: where the extension's functions stand.
    """

    version: str = field(compare=False)
    schema: str = field(compare=False)
    hypertables: tuple[Hypertable, ...] = ()
    aggregates: tuple[ContinuousAggregate, ...] = ()
    jobs: tuple[Job, ...] = ()


def is_own_schema(schema: str) -> bool:
    """Tell whether a schema is one that TimescaleDB makes for itself."""
    return schema.startswith("_timescaledb_")


_ADAPTER = TypeAdapter(Definitions)


def encode(definitions: Definitions) -> bytes:
    """Give definitions as JSON, to be kept in the state."""
    return _ADAPTER.dump_json(definitions)


def decode(content: bytes) -> Definitions:
    """Give what `encode` was given."""
    return _ADAPTER.validate_json(content)


def parents_first(aggregates: Iterable[ContinuousAggregate]) -> tuple[ContinuousAggregate, ...]:
    """Order aggregates by their names, each behind the one that it reads."""
    waiting = {each.name: each for each in sorted(aggregates, key=lambda each: each.name)}
    ordered: list[ContinuousAggregate] = []
    while waiting:
        ready = [each for each in waiting.values() if each.parent not in waiting]
        if not ready:  # cannot be: an aggregate reads what was there before it
            return (*ordered, *waiting.values())
        ordered += ready
        for each in ready:
            del waiting[each.name]
    return tuple(ordered)
