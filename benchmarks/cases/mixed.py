"""The database of the snapshot cases: a time series and JSON events, with their indexes, about 510 MB."""

from __future__ import annotations

from benchmarks.results import Plan
from benchmarks.snapshot import Database

METRICS, EVENTS = 3_000_000, 1_000_000


def mixed_database(plan: Plan) -> Database:
    metrics, events = plan.scaled(METRICS), plan.scaled(EVENTS)
    return Database(
        statements=(
            "create table public.metrics (device int, at timestamptz, temperature float8, humidity float8)",
            f"""insert into public.metrics select i % 1000, timestamptz '2026-01-01' + i * interval '1 s',
            20 + i % 17 / 3.0, i % 97 / 1.3 from generate_series(1, {metrics}) i""",
            "alter table public.metrics add primary key (device, at)",
            "create index on public.metrics (at)",
            "create table public.events (id bigint primary key, at timestamptz not null, kind text, payload jsonb)",
            f"""insert into public.events select i, timestamptz '2026-01-01' + i * interval '1 s', 'kind ' || i % 20,
            jsonb_build_object('device', i % 1000, 'user', md5(i::text), 'tags', jsonb_build_array('a', i % 7, 'c'),
                'note', repeat('x', 60 + i % 60), 'value', i / 7.0)
            from generate_series(1, {events}) i""",
            "create index on public.events (kind, at)",
            "create index on public.events ((payload ->> 'device'))",
        ),
        tables=("public.metrics", "public.events"),
        rows=metrics + events,
    )
