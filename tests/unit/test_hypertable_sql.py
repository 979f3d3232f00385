"""Statements and gaps; tests/timescale runs the statements."""

from __future__ import annotations

import dataclasses

import pytest

from live_migration.common.relation import QualifiedName
from live_migration.coordinator.hypertable_definitions import (
    Compression,
    ContinuousAggregate,
    Definitions,
    Dimension,
    Hypertable,
    Index,
    Job,
    OrderBy,
    SparseIndex,
    decode,
    encode,
    parents_first,
)
from live_migration.coordinator.hypertable_gaps import assess_definitions, functions_of, jobs_to_make
from live_migration.coordinator.hypertable_sql import (
    Target,
    aggregate_index_statements,
    aggregate_statements,
    compression_statements,
    hypertable_statements,
    job_statement,
    refresh_statement,
    schedule_statement,
)

OLD, NEW = Target((2, 16, 0), 'my "ext'), Target((2, 29, 2), "public")
TABLE = Hypertable(
    QualifiedName("S s", "o'd\"d\\"),
    (
        Dimension("T", "bigint", 1000, now_function=QualifiedName("f", "now")),
        Dimension("k'", "text", partitions=4, function=QualifiedName("f", "hash")),
    ),
    chunk_schema="ch",
    chunk_prefix="p'",
    compression=Compression(
        ('a,"', "b"),
        (OrderBy("T", True, True), OrderBy("x")),
        60,
        (SparseIndex("bloom", ("A", "b")), SparseIndex("minmax", ("c",)), SparseIndex("firstlast", ("c",))),
    ),
)
HOURLY = ContinuousAggregate(
    QualifiedName("s", "hourly"),
    "select 1",
    TABLE.name,
    True,
    "hour",
    10,
    indexes=frozenset(
        {Index(None, "USING btree (hour DESC)"), Index(None, 'USING btree ("K", hour)'), Index("my I", "USING gin (x)")}
    ),
    comment="it's",
)
RETENTION = Job(
    QualifiedName("_timescaledb_functions", "policy_retention"),
    "P1D",
    '{"drop_after": 5}',
    TABLE.name,
    "hypertable_id",
    QualifiedName("_timescaledb_functions", "policy_retention_check"),
    timezone="Europe/Berlin",
    name="Retention's",
    id=1001,
)


def test_hypertable_with_odd_names() -> None:
    create, add, now = hypertable_statements(TABLE, OLD)
    table = """ E'"S s"."o''d""d\\\\"'::regclass"""
    assert create == (
        f"""select "my ""ext"."create_hypertable"({table}, 'T'::name, chunk_time_interval => 1000::bigint, """
        "associated_schema_name => 'ch', associated_table_prefix => 'p''', create_default_indexes => false)"
    )
    assert "'k'''::name, number_partitions => 4, partitioning_func => '\"f\".\"hash\"'::regproc" in add
    assert '"f"."now"()\'::regprocedure::regproc' in now


def test_compression_by_release() -> None:
    (old,) = compression_statements(TABLE, OLD)
    assert 'timescaledb.compress_segmentby = \'"a,""", "b"\'' in old
    assert 'timescaledb.compress_orderby = \'"T" desc nulls first, "x" asc nulls last\'' in old
    assert "timescaledb.compress_chunk_time_interval = '60 microseconds'" in old
    assert "compress_index" not in old
    (middle,) = compression_statements(TABLE, Target((2, 24, 0), "public"))
    assert "timescaledb.compress_index = 'minmax(\"c\")'" in middle
    (new,) = compression_statements(TABLE, NEW)
    assert 'timescaledb.compress_index = \'bloom("A", "b"), minmax("c"), firstlast("c")\'' in new
    plain = dataclasses.replace(TABLE, compression=Compression(), skipping=("x",))
    setting, skipping = compression_statements(plain, NEW)
    assert setting.endswith("set (timescaledb.compress = true)")
    assert "enable_chunk_skipping" in skipping
    nothing = dataclasses.replace(TABLE, compression=Compression(segment_by=(), sparse_indexes=()))
    (statement,) = compression_statements(nothing, NEW)
    assert statement.endswith("timescaledb.compress_segmentby = '', timescaledb.compress_index = '')")


def test_aggregate_and_its_indexes() -> None:
    create, interval, comment = aggregate_statements(HOURLY, NEW)
    assert "timescaledb.materialized_only = true, timescaledb.create_group_indexes = false" in create
    assert create.endswith("as\nselect 1\nwith no data")
    assert "10::bigint" in interval
    assert comment == """comment on view "s"."hourly" is 'it''s'"""
    assert aggregate_index_statements(HOURLY) == [
        'create index on "s"."hourly" USING btree ("K", hour)',
        'create index "my I" on "s"."hourly" USING gin (x)',
    ]
    assert refresh_statement(HOURLY.name, NEW).startswith('call "public"."refresh_continuous_aggregate"(')


def test_jobs() -> None:
    statement = job_statement(RETENTION, [], NEW)
    assert statement.count("timezone => 'Europe/Berlin'") == 2
    assert "scheduled => false" in statement
    assert "'hypertable_id', (select id from _timescaledb_catalog.hypertable where schema_name = 'S s'" in statement
    assert "job_name => 'Retention''s'" in statement
    assert "job_name" not in job_statement(RETENTION, [], OLD)
    of_aggregate = dataclasses.replace(RETENTION, relation=HOURLY.name, id_key="mat_hypertable_id")
    assert "select mat_hypertable_id from _timescaledb_catalog.continuous_agg" in job_statement(
        of_aggregate, [HOURLY.name], NEW
    )
    assert (
        schedule_statement(7, NEW, is_scheduled=True, timezone=None)
        == 'select "public"."alter_job"(7, scheduled => true)'
    )
    assert schedule_statement(7, NEW, is_scheduled=False, timezone="A'B").endswith(
        "scheduled => false, timezone => 'A''B')"
    )


def test_definitions_are_kept_as_they_are() -> None:
    definitions = Definitions("2.29.2", "public", (TABLE,), (HOURLY,), (RETENTION,))
    assert decode(encode(definitions)) == definitions
    assert decode(encode(definitions)).version == "2.29.2"


@pytest.mark.parametrize("turn", [1, -1])
def test_parents_come_first(turn: int) -> None:
    names = [QualifiedName("s", letter) for letter in "cab"]
    chain = [
        dataclasses.replace(HOURLY, name=name, parent=parent)
        for name, parent in zip(names, [TABLE.name, *names], strict=False)
    ]
    assert [each.name.name for each in parents_first(chain[::turn])] == ["c", "a", "b"]


def test_what_a_target_cannot_be_given() -> None:
    action = Job(QualifiedName("s", "act"), "P1D", '{"mat_hypertable_id": 3}', id=1002)
    uuid = Hypertable(QualifiedName("s", "u"), (Dimension("id", "uuid", 5),), extras=("direct_compress",))
    definitions = Definitions("2.29.2", "public", (TABLE, uuid), (HOURLY,), (RETENTION, action))
    assert functions_of(definitions) >= {QualifiedName("f", "hash"), QualifiedName("f", "now"), action.procedure}
    absent = {QualifiedName("f", "hash"), RETENTION.procedure}
    found = assess_definitions(definitions, OLD, absent)
    expected = [
        ("error", 'TimescaleDB in schema my "ext, the source in public'),
        ("error", "needs function f.hash"),
        ("error", "partitioned by a UUID"),
        ("warning", "(bloom, firstlast, minmax)"),
        ("warning", "s.u: direct_compress"),
        ("warning", "job 1001 (policy_retention of S s."),
        ("warning", "job 1002 (s.act)"),
    ]
    for each, (level, words) in zip(found, expected, strict=True):
        assert each.level == level
        assert words in each.what
    assert jobs_to_make(definitions, absent) == (action,)
