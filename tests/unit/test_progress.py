from __future__ import annotations

import pytest

from live_migration.common.progress import (
    Lag,
    LagMeter,
    LagState,
    RateMeter,
    TableProgress,
    format_bytes,
    format_clock,
    format_duration,
    format_number_of,
    remaining_seconds,
    sum_up,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (98.631, "1 minute 38.631 seconds"),
        (0.5, "0.500 seconds"),
        (59.9999, "1 minute 0.000 seconds"),
        (7_500, "2 hours 5 minutes 0.000 seconds"),
        (90_061, "1 day 1 hour 1 minute 1.000 seconds"),
    ],
)
def test_duration_in_words(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_clock() -> None:
    assert format_clock(3_723) == "1:02:03"
    assert format_clock(None) == "-:--:--"


def test_rate_is_measured_over_the_window_only() -> None:
    meter = RateMeter(window_seconds=10)
    assert meter.rate is None
    meter.add(0, 0)
    assert meter.rate is None
    meter.add(10, 1_000)
    assert meter.rate == 100
    meter.add(20, 1_000)
    assert meter.rate == 0


def test_rate_begins_anew_when_the_number_falls() -> None:
    meter = RateMeter()
    meter.add(0, 1_000)
    meter.add(1, 10)
    assert meter.rate is None
    meter.add(2, 30)
    assert meter.rate == 20


def test_rate_of_two_readings_at_one_time_is_unknown() -> None:
    meter = RateMeter()
    meter.add(1, 5)
    meter.add(1, 9)
    assert meter.rate is None


def test_remaining_time() -> None:
    assert remaining_seconds(50, 150, 10) == 10
    assert remaining_seconds(150, 150, None) == 0
    assert remaining_seconds(50, 150, None) is None
    assert remaining_seconds(50, 150, 0) is None


def table(state: str, rows: int, estimate: int, size: int, **more: int) -> TableProgress:
    return TableProgress("public.t", state, rows, rows * 10, estimate, size, **more)


def test_table_is_whole_only_when_it_says_so() -> None:
    assert table("copying", 200, 100, 1_000).fraction == 0.99
    assert table("copied", 90, 100, 1_000).fraction == 1
    assert table("copying", 25, 100, 1_000).done_bytes == 250


def test_table_without_estimate_counts_its_parts() -> None:
    assert table("copying", 5, 0, 1_000, part_count=4, parts_done=1).fraction == 0.25
    assert table("planned", 0, 0, 0).fraction == 0


def test_totals_add_up() -> None:
    totals = sum_up([table("ready", 100, 100, 1_000), table("copying", 50, 100, 3_000)])
    assert (totals.tables, totals.tables_copied, totals.row_count) == (2, 1, 150)
    assert (totals.done_bytes, totals.size_bytes) == (2_500, 4_000)


def test_small_lag_is_caught_up_even_before_rates_are_known() -> None:
    lag = Lag(511_999)
    assert lag.state is LagState.CAUGHT_UP
    assert lag.line == (
        "Target has caught up with source "
        "(source_wal_rate: not known yet, target_replay_rate: not known yet, replay_lag: 500.0 KiB)"
    )


def test_lag_gone_within_ten_seconds_is_caught_up() -> None:
    assert Lag(9_000_000, 1_000_000, 2_000_000).state is LagState.CAUGHT_UP
    assert Lag(11_000_000, 1_000_000, 2_000_000).state is LagState.CATCHING_UP


def test_lag_line_says_when_replay_will_complete() -> None:
    assert Lag(98_631_000, 0, 1_000_000).line == (
        "Live-replay will complete in 1 minute 38.631 seconds "
        "(source_wal_rate: 0 B/s, target_replay_rate: 976.6 KiB/s, replay_lag: 94.1 MiB)"
    )


def test_lag_line_warns_when_the_source_is_faster() -> None:
    lag = Lag(10_000_000, 2 << 20, 1 << 20)
    assert lag.line == (
        "WARNING live-replay not keeping up with source load "
        "(source_wal_rate: 2.0 MiB/s, target_replay_rate: 1.0 MiB/s, replay_lag: 9.5 MiB)"
    )
    assert lag.remaining_seconds is None


def test_lag_before_the_first_rate_is_not_judged() -> None:
    assert Lag(10_000_000).state is LagState.UNKNOWN


def test_idle_lane_is_as_far_as_the_log() -> None:
    lag = LagMeter().read(
        0, source_lsn=1_000, log_end=990, log_lanes=[(100, 1), (0, 0)], checkpoints={0: (100, 1), 1: (0, 0)}
    )
    assert lag.lag_bytes == 10


def test_lane_behind_the_log_is_only_as_far_as_its_checkpoint() -> None:
    lag = LagMeter().read(
        0, source_lsn=1_000, log_end=990, log_lanes=[(900, 5), (0, 0)], checkpoints={0: (900, 4), 1: (0, 0)}
    )
    assert lag.lag_bytes == 100


def test_new_change_in_a_long_idle_lane_is_not_hours_of_lag() -> None:
    meter = LagMeter()
    meter.read(0, source_lsn=10_000, log_end=10_000, log_lanes=[(5, 1)], checkpoints={0: (5, 1)})
    lag = meter.read(1, source_lsn=10_300, log_end=10_200, log_lanes=[(10_100, 1)], checkpoints={0: (5, 1)})
    assert lag.lag_bytes == 300


def test_lane_never_applied_starts_where_the_log_starts() -> None:
    lag = LagMeter(start_lsn=700).read(0, source_lsn=1_000, log_end=1_000, log_lanes=[(900, 1)], checkpoints={})
    assert lag.lag_bytes == 300


def test_rate_is_not_judged_before_it_means_something() -> None:
    meter = LagMeter(least_seconds=5.0)
    for at in (0, 4.9):
        lag = meter.read(at, source_lsn=10**7, log_end=10**7, log_lanes=[(10**7, 1)], checkpoints={})
        assert lag.state is LagState.UNKNOWN
    lag = meter.read(5, source_lsn=10**7, log_end=10**7, log_lanes=[(10**7, 1)], checkpoints={})
    assert lag.state is LagState.FALLING_BEHIND


def test_nouns_take_their_plural() -> None:
    assert [format_number_of(n, "table") for n in (0, 1, 2_000)] == ["0 tables", "1 table", "2,000 tables"]


def test_rates_are_in_bytes_of_wal() -> None:
    meter = LagMeter()
    meter.read(0, source_lsn=1_000, log_end=1_000, log_lanes=[(900, 1)], checkpoints={0: (500, 1)})
    lag = meter.read(10, source_lsn=2_000, log_end=2_000, log_lanes=[(1_900, 1)], checkpoints={0: (1_000, 1)})
    assert (lag.source_wal_rate, lag.target_replay_rate) == (100, 50)
