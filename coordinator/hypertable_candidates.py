"""Tables that would do well as hypertables, each with an interval: what the prompt proposes. Pure but for one query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.progress import format_bytes, format_count
from live_migration.coordinator.hypertable_checks import assess_specs
from live_migration.coordinator.hypertable_spec import DAY, HOUR, SECOND, HypertableSpec
from live_migration.coordinator.hypertable_tables import INTEGER_TYPES, Column, Table

LEAST_BYTES = 1 << 30
"""Below this a table gains nothing."""
_INTERVALS = (HOUR, 2 * HOUR, 6 * HOUR, 12 * HOUR, DAY, 7 * DAY, 30 * DAY, 90 * DAY, 365 * DAY)
_DEFAULT = 7 * DAY
_MEMORY_PER_SHARED_BUFFERS = 4  # a quarter of the memory is what is commonly given to shared_buffers
_EPOCHS = ((1, 1e8, 1e10), (1e3, 1e11, 1e13), (1e6, 1e14, 1e16), (1e9, 1e17, 9.2e18))
"""Units a second, and the numbers that count them since 1970 for a time from 1973 on."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A proposal. `chunk_bytes`: what a chunk would have, None where the statistics do not tell; sizes with indexes."""

    spec: HypertableSpec
    size_bytes: int
    row_estimate: int
    chunk_bytes: int | None

    def __str__(self) -> str:
        size = f"{format_bytes(self.size_bytes)}, about {format_count(self.row_estimate)} rows"
        chunks = f", chunks of about {format_bytes(self.chunk_bytes)}" if self.chunk_bytes else ""
        return f"{self.spec} ({size}{chunks})"


async def read_memory(target: asyncpg.Connection) -> int:
    """Give the target's memory in bytes, guessed from its shared_buffers."""
    buffers: int = await target.fetchval("select pg_size_bytes(current_setting('shared_buffers'))")
    return buffers * _MEMORY_PER_SHARED_BUFFERS


def propose(
    tables: Sequence[Table], version: tuple[int, ...], memory_bytes: int, *, least_bytes: int = LEAST_BYTES
) -> list[Candidate]:
    """Give the big tables that can become hypertables as they are, the largest first, each by its best column.

    The interval gives chunks of a quarter of `memory_bytes` at most, as far as the statistics tell, and is one that people use.
    """
    found = []
    for table in sorted(tables, key=lambda table: -table.size_bytes):
        if table.size_bytes < least_bytes or table.is_unlogged:
            continue
        for column in sorted(table.columns, key=lambda column: _rank(table, column)):
            if not _is_time_like(table, column):
                continue
            candidate = _candidate(table, column, memory_bytes)
            if not any(each.level == "error" for each in assess_specs([candidate.spec], tables, version)):
                found.append(candidate)
                break
    return found


def _candidate(table: Table, column: Column, memory_bytes: int) -> Candidate:
    interval = choose_interval(column, table.size_bytes, memory_bytes // 4)
    spec = HypertableSpec(name=table.name, column=column.name, interval=interval, is_duration=column.is_time)
    length = interval / SECOND if column.is_time else interval
    chunk_bytes = round(table.size_bytes * min(1, length / column.span)) if column.span else None
    return Candidate(spec, table.size_bytes, table.row_estimate, chunk_bytes)


def _is_time_like(table: Table, column: Column) -> bool:
    """Tell whether a column is worth a thought: in each key, or leading an index; numbers only where they look like times."""
    if not column.not_null or column.is_generated:
        return False
    if column.is_integer and (column.is_counted or _units_a_second(column) is None):
        return False
    if not (column.is_time or column.is_integer):
        return False
    return bool(table.keys) or column.name in table.leading


def _rank(table: Table, column: Column) -> tuple[bool, bool, bool]:
    """Give the best first: of a type of time, and leading an index; then as they stand in the table."""
    return column.is_integer, column.name not in table.leading, column.type_oid == 1082


def choose_interval(column: Column, size_bytes: int, chunk_bytes: int) -> int:
    """Give the interval of a column, microseconds for times, so that a chunk has at most about `chunk_bytes`.

    One that people use is taken: the next shorter of 1 hour, … 7 days, 30 days, …, for integers that count time
    the same in their unit, for others 1, 2 or 5 and zeros. Without statistics: 7 days, or for integers a million.
    """
    units = None if column.is_time else _units_a_second(column)
    if column.is_integer and units is None:
        return _plain_number(column, size_bytes, chunk_bytes)
    per_second = units or 1
    if column.span is None:
        wanted = float(_DEFAULT)
    else:
        wanted = column.span / per_second * chunk_bytes / max(size_bytes, 1) * SECOND
    least = DAY if column.type_oid == 1082 else _INTERVALS[0]
    interval = max([each for each in _INTERVALS if each <= wanted] or [least])
    interval = max(interval, least)
    return interval if column.is_time else round(interval / SECOND * per_second)


def _plain_number(column: Column, size_bytes: int, chunk_bytes: int) -> int:
    largest = INTEGER_TYPES[column.type_oid]
    if column.span is None:
        return min(1_000_000, largest)
    wanted = max(column.span * chunk_bytes / max(size_bytes, 1), 1)
    power: int = 10 ** math.floor(math.log10(wanted))
    return min(max(factor * power for factor in (1, 2, 5) if factor * power <= wanted), largest)


def _units_a_second(column: Column) -> float | None:
    """Tell what an integer column counts since 1970, from its statistics: 1 for seconds, 1000 for milliseconds, …"""
    if column.low is None or column.high is None:
        return None
    return next((units for units, low, high in _EPOCHS if low <= column.low <= column.high < high), None)
