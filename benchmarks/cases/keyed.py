"""Tables that updates and deletes are made on: a primary key, a few columns, and a last change that can be looked for."""

from __future__ import annotations

from benchmarks.results import Plan

TABLE = """create table public.metrics
    (id bigint primary key, at timestamptz, device int, value float8, note text, round int not null default 0)"""


def filled(count: int) -> str:
    """Give the statement that fills the table with the keys 1 to `count`."""
    return f"""insert into public.metrics select i, timestamptz '2026-01-01' + i * interval '1 s', i % 100, i / 7.0,
        'row ' || i from generate_series(1, {count}) i"""


def all_rounds(plan: Plan) -> int:
    """Give the number of rounds, the warm-up included."""
    return plan.rounds + plan.warm_up
