"""The backlog that several cases share: inserted rows of a time series, 10,000 a transaction, one table, one lane."""

from __future__ import annotations

import asyncpg

from benchmarks.backlog import Backlog
from benchmarks.results import Plan

ROWS = 2_000_000
ROWS_PER_TRANSACTION = 10_000
TABLE = "create table public.metrics (id bigint primary key, at timestamptz, device int, value float8)"
FORCES_TEXT = "; create type mood as enum ('x'); create table public.forces_text (m mood primary key)"
_INSERT = """
    insert into public.metrics select i, timestamptz '2026-01-01' + i * interval '1 s', i % 100, i / 7.0
    from generate_series($1::bigint, $2::bigint) i"""


def insert_backlog(plan: Plan, rows: int = ROWS, *, forces_text: bool = False) -> Backlog:
    """Give the backlog; `forces_text` adds a table with an enum key, which we send no migration with in binary."""
    count = plan.scaled(rows, least=ROWS_PER_TRANSACTION)

    async def load(connection: asyncpg.Connection, number: int) -> int:
        first, last = 1 + (number - 1) * count, number * count
        for start in range(first, last + 1, ROWS_PER_TRANSACTION):
            await connection.execute(_INSERT, start, min(start + ROWS_PER_TRANSACTION - 1, last))
        return count

    def applied(number: int) -> str:
        return f"select exists (select from public.metrics where id = {number * count})"

    return Backlog(
        tables=("public.metrics",),
        schema=TABLE + (FORCES_TEXT if forces_text else ""),
        load=load,
        applied=applied,
    )
