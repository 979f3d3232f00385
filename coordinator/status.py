"""Where a migration stands: phase, tables, lanes, lag, workers and troubles, from the state and the control topic."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from types import TracebackType
from typing import Self, TypeVar

import asyncpg
from pydantic import BaseModel, ValidationError

from live_migration.common import postgres, state
from live_migration.common.control import POSITION, STATUS, LogPosition, ProducerStatus
from live_migration.common.errors import LiveMigrationError
from live_migration.common.kafka import ControlReader
from live_migration.common.lsn import Lsn
from live_migration.common.progress import CopyTotals, Lag, LagMeter, RateMeter, TableProgress, sum_up
from live_migration.common.segment import Position
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, Phase
from live_migration.coordinator.skip import Skip, read_skips, skips_as_dicts

_Record = TypeVar("_Record", bound=BaseModel)

_TABLES = """
    select t.schema_name || '.' || t.table_name as name, t.state,
           case when t.state in ('copied', 'ready') then t.row_count
                else greatest(t.row_count, coalesce(p.rows, 0)) end as row_count,
           case when t.state in ('copied', 'ready') then t.byte_count
                else greatest(t.byte_count, coalesce(p.bytes, 0)) end as byte_count,
           t.row_estimate, t.size_bytes, coalesce(p.parts, 0)::int as part_count, coalesce(p.done, 0)::int as parts_done,
           coalesce(t.error, '') as error, coalesce(t.hint, '') as hint
    from _live_migration.tables t
    left join (select oid, attempt, count(*) as parts, count(*) filter (where state = 'done') as done,
                      sum(row_count)::bigint as rows, sum(byte_count)::bigint as bytes
               from _live_migration.parts group by oid, attempt) p on p.oid = t.oid and p.attempt = t.attempt
    where not t.is_left_out
    order by t.size_bytes desc, 1
"""

_INDEXES = """
    select count(*)::int as total, count(*) filter (where state = 'done')::int as done,
           count(*) filter (where state = 'building')::int as building
    from _live_migration.indexes
"""

_INDEX_ERRORS = "select name, error from _live_migration.indexes where error is not null order by name"

_LANES = """
    select lane, next_offset, (commit_lsn - '0/0'::pg_lsn)::text as commit_lsn, ordinal, owner, change_count, byte_count,
           commit_time, coalesce(error, '') as error, coalesce(hint, '') as hint
    from _live_migration.checkpoints order by lane
"""

_WORKERS = """
    select id, kind, host, pid, extract(epoch from clock_timestamp() - seen_at)::float8 as seen_seconds_ago, rss_bytes,
           coalesce(error, '') as error
    from _live_migration.workers order by kind, id
"""

_EVENTS = "select at, level, message from _live_migration.events order by id desc limit 10"

_COORDINATOR = "select owner, coalesce(lease_until > clock_timestamp(), false) as alive from _live_migration.migration"


@dataclass(frozen=True, slots=True)
class LaneStatus:
    """One lane: what is applied, and what the log holds."""

    lane: int
    position: Position
    log_position: Position
    next_offset: int
    owner: str | None
    change_count: int
    byte_count: int
    commit_time: datetime | None
    error: str
    hint: str

    @property
    def is_behind(self) -> bool:
        """Whether the log holds changes that are not applied."""
        return self.position < self.log_position


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A process of the migration that has shown itself."""

    id: str
    kind: str
    host: str
    pid: int
    seen_seconds_ago: float
    rss_bytes: int
    error: str


@dataclass(frozen=True, slots=True)
class IndexProgress:
    """How many indexes there are, are being built, and are done."""

    total: int
    done: int
    building: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that went wrong, where, and what to do."""

    where: str
    error: str
    hint: str


@dataclass(frozen=True, slots=True)
class Event:
    """A line that the coordinator kept."""

    at: datetime
    level: str
    message: str


@dataclass(frozen=True, slots=True)
class Status:
    """Where a migration stands at one moment. Rates are per second, None where one reading is all there is."""

    migration: Migration
    coordinator: str | None
    """The one that runs the migration now."""
    tables: tuple[TableProgress, ...]
    indexes: IndexProgress
    lanes: tuple[LaneStatus, ...]
    workers: tuple[WorkerStatus, ...]
    producer: ProducerStatus | None
    lag: Lag | None
    row_rate: float | None
    byte_rate: float | None
    change_rate: float | None
    troubles: tuple[Trouble, ...]
    events: tuple[Event, ...]
    """The newest last."""
    skips: tuple[Skip, ...] = ()
    """Changes that the user gave up."""

    @property
    def totals(self) -> CopyTotals:
        """All tables together."""
        return sum_up(self.tables)

    @property
    def change_count(self) -> int:
        """Changes that were applied."""
        return sum(lane.change_count for lane in self.lanes)

    def as_dict(self) -> dict[str, object]:
        """Give the status for JSON: LSNs as text, no secrets."""
        migration = self.migration
        return {
            "id": str(migration.id),
            "name": migration.name,
            "phase": migration.phase.value,
            "phase_at": migration.phase_at,
            "created_at": migration.created_at,
            "source": migration.source_address,
            "kafka": migration.kafka,
            "coordinator": self.coordinator,
            "copy": {**asdict(self.totals), "rows_per_second": self.row_rate, "bytes_per_second": self.byte_rate},
            "tables": [asdict(table) for table in self.tables],
            "indexes": asdict(self.indexes),
            "changes_applied": self.change_count,
            "changes_per_second": self.change_rate,
            "lag": self._lag_as_dict(),
            "lanes": [
                {
                    **asdict(lane),
                    "position": str(lane.position),
                    "log_position": str(lane.log_position),
                    "is_behind": lane.is_behind,
                }
                for lane in self.lanes
            ],
            "workers": [asdict(worker) for worker in self.workers],
            "producer": self._producer_as_dict(),
            "troubles": [asdict(trouble) for trouble in self.troubles],
            "skips": skips_as_dicts(self.skips),
            "events": [asdict(event) for event in self.events],
        }

    def _lag_as_dict(self) -> dict[str, object] | None:
        if self.lag is None:
            return None
        return {
            "state": self.lag.state.value,
            "line": self.lag.line,
            "replay_lag_bytes": self.lag.lag_bytes,
            "source_wal_rate": self.lag.source_wal_rate,
            "target_replay_rate": self.lag.target_replay_rate,
            "remaining_seconds": self.lag.remaining_seconds,
        }

    def _producer_as_dict(self) -> dict[str, object] | None:
        if self.producer is None:
            return None
        lsns = {
            name: str(Lsn(getattr(self.producer, name))) for name in ("received_lsn", "confirmed_lsn", "source_lsn")
        }
        return {**self.producer.model_dump(), **lsns}


class StatusReader:
    """Reads a migration's status again and again, and so knows rates; `async with` holds its connections.

    Where Kafka or the source cannot be reached, what they would tell is missing, and nothing else is.
    """

    def __init__(self, settings: Settings, *, least_seconds: float = 5.0) -> None:
        """Read what `settings` name; the lag is not judged by rates over less than `least_seconds`."""
        self._settings = settings
        self._least_seconds = least_seconds
        self._stack = AsyncExitStack()
        self._target: asyncpg.Connection | None = None
        self._source: asyncpg.Connection | None = None
        self._control: ControlReader | None = None
        self._lag_meter: LagMeter | None = None
        self._rows = RateMeter(15.0)
        self._bytes = RateMeter(15.0)
        self._changes = RateMeter(15.0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all connections; the next `read` makes them anew."""
        self._target = self._source = self._control = None
        stack, self._stack = self._stack, AsyncExitStack()
        await stack.aclose()

    async def read(self) -> Status | None:
        """Give the status, or None where the target holds no migration.

        Raises:
            LiveMigrationError: the target cannot be read; the next call connects anew.
        """
        try:
            target = await self._connect_target()
            with postgres.asking("target", "reading the migration's state"):
                # The log's end must be older than the checkpoints, or what is applied would look ahead of the log.
                migration = await state.read_migration(target)
                if migration is None:
                    return None
                control = await self._read_control(migration)
                source_lsn = await self._read_source_lsn()
                async with target.transaction(isolation="repeatable_read", readonly=True):
                    return await self._read_state(target, migration, control, source_lsn)
        except LiveMigrationError:
            await self.close()
            raise

    async def read_with_rates(self, seconds: float = 1.0) -> Status | None:
        """Read twice, some time apart, for a caller who reads but once and wants rates."""
        if await self.read() is not None:
            await asyncio.sleep(seconds)
        return await self.read()

    async def _connect_target(self) -> asyncpg.Connection:
        if self._target is None or self._target.is_closed():
            self._target = await self._stack.enter_async_context(
                postgres.session(self._settings.target_uri(), "target", application="live-migration status")
            )
        return self._target

    async def _connect_source(self) -> asyncpg.Connection:
        if self._source is None or self._source.is_closed():
            self._source = await self._stack.enter_async_context(
                postgres.session(self._settings.source_uri(), "source", application="live-migration status")
            )
        return self._source

    async def _read_source_lsn(self) -> int | None:
        if self._settings.source is None:
            return None
        try:
            with postgres.asking("source", "reading the end of the WAL"):
                source = await self._connect_source()
                return int(await source.fetchval("select (pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::text"))
        except LiveMigrationError:
            self._source = None
            return None

    async def _read_control(self, migration: Migration) -> dict[bytes, bytes]:
        if migration.phase in (Phase.PREPARE, Phase.SCHEMA):
            return {}
        try:
            if self._control is None:
                settings = self._settings.model_copy(update={"kafka": self._settings.kafka or migration.kafka})
                self._control = await self._stack.enter_async_context(ControlReader(settings))
            return await self._control.read()
        except LiveMigrationError:
            self._control = None
            return {}

    async def _read_state(
        self, target: asyncpg.Connection, migration: Migration, control: dict[bytes, bytes], source_lsn: int | None
    ) -> Status:
        coordinator = await target.fetchrow(_COORDINATOR)
        tables = tuple(TableProgress(**dict(row)) for row in await target.fetch(_TABLES))
        producer = _parse(ProducerStatus, control.get(STATUS))
        log = _parse(LogPosition, control.get(POSITION))
        lanes = _lanes(await target.fetch(_LANES), log)
        now = time.monotonic()
        totals = sum_up(tables)
        self._rows.add(now, totals.row_count)
        self._bytes.add(now, totals.byte_count)
        self._changes.add(now, sum(lane.change_count for lane in lanes))
        workers = tuple(WorkerStatus(**dict(row)) for row in await target.fetch(_WORKERS))
        indexes = IndexProgress(**dict(await target.fetchrow(_INDEXES)))
        index_troubles = [
            Trouble(f"index {row['name']}", row["error"], "") for row in await target.fetch(_INDEX_ERRORS)
        ]
        return Status(
            migration=migration,
            coordinator=coordinator["owner"] if coordinator["alive"] else None,
            tables=tables,
            indexes=indexes,
            lanes=lanes,
            workers=workers,
            producer=producer,
            lag=self._measure_lag(
                now, migration, log, lanes, source_lsn or (producer.source_lsn if producer else None)
            ),
            row_rate=self._rows.rate,
            byte_rate=self._bytes.rate,
            change_rate=self._changes.rate,
            troubles=(*_troubles(tables, lanes, workers, producer), *index_troubles),
            events=tuple(Event(**dict(row)) for row in reversed(await target.fetch(_EVENTS))),
            skips=await read_skips(target),
        )

    def _measure_lag(
        self,
        now: float,
        migration: Migration,
        log: LogPosition | None,
        lanes: tuple[LaneStatus, ...],
        source_lsn: int | None,
    ) -> Lag | None:
        if log is None or migration.phase not in (Phase.REPLAY, Phase.CUTOVER):
            return None
        if self._lag_meter is None:
            self._lag_meter = LagMeter(migration.start_lsn or 0, least_seconds=self._least_seconds)
        return self._lag_meter.read(
            now,
            source_lsn=max(source_lsn or 0, log.confirm_lsn),
            log_end=log.confirm_lsn,
            log_lanes=log.lanes,
            checkpoints={lane.lane: lane.position for lane in lanes},
        )


def _parse(kind: type[_Record], value: bytes | None) -> _Record | None:
    try:
        return kind.model_validate_json(value) if value else None
    except ValidationError:
        return None


def _lanes(rows: list[asyncpg.Record], log: LogPosition | None) -> tuple[LaneStatus, ...]:
    ends = log.lanes if log else ()
    return tuple(
        LaneStatus(
            lane=row["lane"],
            position=Position(int(row["commit_lsn"]), row["ordinal"]),
            log_position=Position(*ends[row["lane"]]) if row["lane"] < len(ends) else Position(0, 0),
            **{name: row[name] for name in LaneStatus.__slots__ if name not in ("lane", "position", "log_position")},
        )
        for row in rows
    )


def _troubles(
    tables: tuple[TableProgress, ...],
    lanes: tuple[LaneStatus, ...],
    workers: tuple[WorkerStatus, ...],
    producer: ProducerStatus | None,
) -> list[Trouble]:
    found = [Trouble(f"table {table.name}", table.error, table.hint) for table in tables if table.error]
    found += [Trouble(f"lane {lane.lane}", lane.error, lane.hint) for lane in lanes if lane.error]
    found += [Trouble(f"{worker.kind} {worker.id}", worker.error, "") for worker in workers if worker.error]
    if producer and producer.error:
        found.append(Trouble(f"producer {producer.worker}", producer.error, ""))
    return found
