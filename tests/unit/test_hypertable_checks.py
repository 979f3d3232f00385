"""What is said against tables that are to become hypertables; tests/timescale asks a server the same."""

from __future__ import annotations

import dataclasses

import pytest

from live_migration.common.errors import UsageError
from live_migration.common.relation import QualifiedName
from live_migration.common.settings import load_settings
from live_migration.coordinator.hypertable_candidates import choose_interval, propose
from live_migration.coordinator.hypertable_checks import assess_specs, skipped_oids
from live_migration.coordinator.hypertable_skips import Skips, read_skips
from live_migration.coordinator.hypertable_spec import DAY, HOUR, parse_spec
from live_migration.coordinator.hypertable_tables import Column, ForeignKey, Key, Table

VERSION = (2, 29, 2)
GIB = 1 << 30
TIME = Column("time", "timestamp with time zone", 1184, low=1.7e9, high=1.7e9 + 100 * 86400)
COUNT = Column("n", "bigint", 20)
TABLE = Table(
    1,
    QualifiedName("public", "m"),
    (TIME, Column("device", "integer", 23), COUNT, Column("maybe", "date", 1082, not_null=False)),
    size_bytes=100 * GIB,
    row_estimate=10**9,
    keys=(Key(2, "m_pkey", "primary key", ("device", "time"), 3),),
    identity_columns=("device", "time"),
    leading=frozenset({"device"}),
)


def _said(text: str, table: Table = TABLE, version: tuple[int, ...] | None = VERSION, **options: object) -> list[str]:
    found = assess_specs([parse_spec(text)], [table], version, **options)  # type: ignore[arg-type]
    assert all(each.hint for each in found)
    return [f"{each.level}: {each.what}" for each in found]


def test_nothing_is_said_against_a_good_one() -> None:
    assert _said("m:time,1 day") == []
    assert assess_specs([], [], None) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("M2:time,1 day", "no such table"),
        ("m:Time2,1 day", "no column time2"),
        ("m:maybe,1 day", "may be null"),
        ("m:time,86400", "lacks a unit"),
        ("m:n,1 day", "whose interval is a plain number"),
        ("m:time,1 day,none,4", "no column none"),
    ],
)
def test_columns_and_intervals(text: str, complaint: str) -> None:
    (said,) = _said(text)
    assert said.startswith("error")
    assert complaint in said


def test_a_table_of_another_case_is_suggested() -> None:
    (found,) = assess_specs([parse_spec('"M":time,1 day')], [TABLE], VERSION)
    assert found.hint == "Is it public.m?"


def test_target_without_timescaledb() -> None:
    (said,) = _said("m:time,1 day", version=None)
    assert "has no TimescaleDB" in said


def test_senseless_intervals() -> None:
    (many,) = _said("m:time,10 minutes")
    assert many.startswith("warning")
    assert "about 14,400 chunks" in many
    (too_many,) = _said("m:time,1 second")
    assert too_many.startswith("error")
    (large,) = _said("m:time,30 days", memory_bytes=16 * GIB)
    assert "a chunk would have about 30.0 GiB, more than the target's memory (16.0 GiB)" in large


def test_keys_and_references_have_a_choice() -> None:
    only_id = Key(5, "only_id", "unique index", ("device",))
    refers = ForeignKey(6, "fk", QualifiedName("public", "r"), 5)
    table = dataclasses.replace(TABLE, keys=(*TABLE.keys, only_id), references=(refers,), identity_columns=("device",))
    specs = [parse_spec("m:time,1 day")]
    key, reference, identity = assess_specs(specs, [table], VERSION)
    assert (key.level, reference.level, identity.level) == ("error", "error", "warning")
    assert "unique index only_id lacks the partitioning column time" in key.what
    assert "over (device, time)" in key.hint
    assert "--skip-hypertable-object 'public.m.only_id'" in key.hint
    assert "by a key that it cannot have (only_id)" in reference.what
    assert "identified by (device), without time" in identity.what
    assert "--skip-hypertable-object 'public.r.fk'" in reference.hint
    skips = Skips(everything=True)
    assert [each.level for each in assess_specs(specs, [table], VERSION, skips=skips)] == ["warning"] * 3
    assert skipped_oids(specs, [table], VERSION, skips) == {5, 6}


def test_keys_and_references_are_let_go_one_by_one() -> None:
    only_id = Key(5, "Only id", "unique constraint", ("device",), 7)
    refers = ForeignKey(6, "fk", QualifiedName("public", "r"), 5)
    table = dataclasses.replace(TABLE, keys=(*TABLE.keys, only_id), references=(refers,))
    specs = [parse_spec("m:time,1 day")]

    def said(*names: str) -> list[str]:
        skips = _skips(*names)
        return [each.level for each in assess_specs(specs, [table], VERSION, skips=skips)]

    assert said() == ["error", "error"]
    assert said('m."Only id"') == ["warning", "error"]
    assert said("public.r.fk") == ["error", "warning"]
    assert said('Public.M."Only id"', "r.fk") == ["warning", "warning"]
    assert skipped_oids(specs, [table], VERSION, _skips('m."Only id"')) == {5, 7}
    assert skipped_oids(specs, [table], VERSION, _skips("r.fk")) == {6}
    assert skipped_oids(specs, [table], VERSION, _skips()) == frozenset()


@pytest.mark.parametrize("name", ["public.m.m_pkey", "m.absent", "other.r.fk"])
def test_what_hypertables_can_have_or_nobody_knows_is_not_let_go(name: str) -> None:
    only_id = Key(5, "Only id", "unique index", ("device",))
    table = dataclasses.replace(TABLE, keys=(*TABLE.keys, only_id))
    found = assess_specs([parse_spec("m:time,1 day")], [table], VERSION, skips=_skips('m."Only id"', name))
    (refused,) = [each for each in found if each.level == "error"]
    assert name in refused.what
    assert 'public.m."Only id"' in refused.hint


@pytest.mark.parametrize("name", ["m_pkey", "a.b.c.d", "a.b.", "a b.c", ""])
def test_names_that_cannot_be_read(name: str) -> None:
    with pytest.raises(UsageError, match="cannot read --skip-hypertable-object"):
        _skips(name)


def _skips(*names: str) -> Skips:
    return read_skips(
        load_settings({"source": "postgres://a", "target": "postgres://b", "skip_hypertable_object": names})
    )


def test_references_by_release() -> None:
    table = dataclasses.replace(TABLE, references=(ForeignKey(6, "fk", QualifiedName("public", "r"), 2),))
    assert _said("m:time,1 day", table) == []
    assert len(_said("m:time,1 day", table, (2, 15, 3))) == 1
    itself = dataclasses.replace(TABLE, references=(ForeignKey(6, "fk", TABLE.name, 2),))
    (said,) = _said("m:time,1 day", itself)
    assert "a hypertable cannot refer to a hypertable" in said


def test_key_without_the_partition_column() -> None:
    (said,) = [each for each in _said("m:time,1 day,n,4") if each.startswith("error")]
    assert "primary key m_pkey lacks the partitioning column n" in said
    assert skipped_oids([parse_spec("m:time,1 day,n,4")], [TABLE], VERSION, Skips(everything=True)) == {2, 3}


@pytest.mark.parametrize(
    ("days", "size", "interval"),
    [
        (100, 100 * GIB, DAY),
        (100, 1000 * GIB, 6 * HOUR),
        (1000, 100 * GIB, 30 * DAY),
        (1, 10000 * GIB, HOUR),
        (5000, GIB, 365 * DAY),
    ],
)
def test_interval_by_size_and_memory(days: int, size: int, interval: int) -> None:
    column = dataclasses.replace(TIME, high=1.7e9 + days * 86400)
    assert choose_interval(column, size, 4 * GIB) == interval


def test_interval_of_integers() -> None:
    seconds = dataclasses.replace(COUNT, low=1.7e9, high=1.7e9 + 100 * 86400)
    assert choose_interval(seconds, 100 * GIB, 4 * GIB) == 86400
    millis = dataclasses.replace(COUNT, low=1.7e12, high=1.7e12 + 100 * 86400e3)
    assert choose_interval(millis, 100 * GIB, 4 * GIB) == 86400000
    plain = dataclasses.replace(COUNT, low=0, high=1e6)
    assert choose_interval(plain, 100 * GIB, 4 * GIB) == 20000
    assert choose_interval(COUNT, 100 * GIB, 4 * GIB) == 1_000_000
    small = Column("s", "smallint", 21)
    assert choose_interval(small, 100 * GIB, 4 * GIB) == 32767


def test_interval_without_statistics_and_of_a_date() -> None:
    assert choose_interval(dataclasses.replace(TIME, low=None), 100 * GIB, GIB) == 7 * DAY
    day = Column("d", "date", 1082, low=1.7e9, high=1.7e9 + 86400)
    assert choose_interval(day, 100 * GIB, GIB) == DAY


def test_proposals_are_large_and_possible() -> None:
    small = dataclasses.replace(TABLE, name=QualifiedName("a", "small"), size_bytes=GIB - 1)
    only_id = dataclasses.replace(
        TABLE, name=QualifiedName("a", "by_id"), keys=(Key(5, "k", "primary key", ("device",)),)
    )
    larger = dataclasses.replace(TABLE, name=QualifiedName("a", "larger"), size_bytes=200 * GIB)
    partitioned = dataclasses.replace(TABLE, name=QualifiedName("a", "parts"), is_partitioned=True)
    found = propose([small, only_id, partitioned, TABLE, larger], VERSION, 16 * GIB)
    assert [str(each.spec) for each in found] == ["a.larger:time,1 day", "public.m:time,1 day"]
    assert str(found[1]) == "public.m:time,1 day (100.0 GiB, about 1,000,000,000 rows, chunks of about 1.0 GiB)"


def test_without_a_key_the_column_must_lead_an_index() -> None:
    bare = dataclasses.replace(TABLE, keys=(), identity_columns=(), leading=frozenset())
    assert propose([bare], VERSION, 16 * GIB) == []
    assert len(propose([dataclasses.replace(bare, leading=frozenset({"time"}))], VERSION, 16 * GIB)) == 1
