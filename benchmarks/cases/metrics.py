"""The one table that is copied in parts."""

from __future__ import annotations

from benchmarks.snapshot import Database


def metrics_database(rows: int) -> Database:
    """Give a database with a table of so many rows, 60 bytes each, and its primary key."""
    return Database(
        statements=(
            "create table public.metrics (id bigint primary key, at timestamptz, device int, value float8)",
            f"""insert into public.metrics select i, timestamptz '2026-01-01' + i * interval '1 s', i % 100, i / 7.0
            from generate_series(1, {rows}) i""",
        ),
        tables=("public.metrics",),
        rows=rows,
    )
