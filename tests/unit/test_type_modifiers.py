"""Which modifiers of a target's column lose something of the source's values."""

from __future__ import annotations

import pytest

from live_migration.consumer.type_modifiers import may_lose

NUMERIC, VARCHAR, TIMESTAMP, INTERVAL, UNKNOWN = 1700, 1043, 1114, 1186, 20000


def numeric(precision: int, scale: int) -> int:
    return ((precision << 16) | (scale & 0x7FF)) + 4


def interval(fields: int = 0x7FFF, digits: int = 0xFFFF) -> int:
    return fields << 16 | digits


DAY, DAY_TO_HOUR, DAY_TO_SECOND = 1 << 3, 1 << 3 | 1 << 10, 1 << 3 | 1 << 10 | 1 << 11 | 1 << 12
YEAR_TO_MONTH = 1 << 2 | 1 << 1


@pytest.mark.parametrize(
    ("type_oid", "narrow", "wide"),
    [
        (NUMERIC, numeric(10, 2), -1),
        (NUMERIC, numeric(10, 2), numeric(12, 2)),
        (NUMERIC, numeric(10, 2), numeric(12, 4)),
        (NUMERIC, numeric(10, -3), numeric(11, -2)),
        (1231, numeric(10, 2), -1),
        (VARCHAR, 4 + 3, -1),
        (VARCHAR, 4 + 3, 4 + 5),
        (1015, 4 + 3, 4 + 5),
        (1560, 3, 5),
        (TIMESTAMP, 0, -1),
        (TIMESTAMP, 0, 3),
        (1185, 3, 6),
        (INTERVAL, interval(digits=0), -1),
        (INTERVAL, interval(digits=0), interval(digits=3)),
        (INTERVAL, interval(DAY), interval(DAY_TO_SECOND, 0)),
        (INTERVAL, interval(YEAR_TO_MONTH), interval(DAY)),
        (INTERVAL, interval(DAY_TO_HOUR), interval()),
        (1187, interval(DAY), -1),
        (UNKNOWN, 3, -1),
    ],
)
def test_the_wider_one_loses_nothing(type_oid: int, narrow: int, wide: int) -> None:
    assert may_lose(type_oid, wide, narrow)
    assert not may_lose(type_oid, narrow, wide)


@pytest.mark.parametrize(
    ("type_oid", "one", "other"),
    [
        (TIMESTAMP, 6, -1),
        (INTERVAL, interval(digits=6), -1),
        (INTERVAL, interval(), -1),
        (NUMERIC, numeric(10, 2), numeric(10, 2)),
        (UNKNOWN, -1, -1),
    ],
)
def test_what_is_the_same_loses_nothing(type_oid: int, one: int, other: int) -> None:
    assert not may_lose(type_oid, one, other)
    assert not may_lose(type_oid, other, one)


def test_digits_before_and_behind_the_point_count_each() -> None:
    assert may_lose(NUMERIC, numeric(10, 2), numeric(10, 4))
    assert may_lose(NUMERIC, numeric(10, 4), numeric(10, 2))


def test_of_an_unknown_type_any_other_limit_counts() -> None:
    assert may_lose(UNKNOWN, 3, 4)
    assert may_lose(UNKNOWN, 4, 3)
