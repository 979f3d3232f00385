"""Which transactions a table's copy holds: the rule that decides between a row lost and a row applied twice."""

from __future__ import annotations

import pytest

from live_migration.common.visibility import EVERYTHING, CopySnapshot

HORIZON = 0x5000
SNAPSHOT = CopySnapshot.parse("100:110:103,107", HORIZON)


def test_the_text_form_is_read() -> None:
    assert CopySnapshot(100, 110, frozenset({103, 107}), HORIZON) == SNAPSHOT
    assert CopySnapshot.parse("100:100:", 1) == CopySnapshot(100, 100, frozenset(), 1)


@pytest.mark.parametrize(
    ("xid", "is_in_copy"),
    [
        (99, True),  # ended before the oldest that ran
        (100, True),  # at xmin, and not among those that ran
        (102, True),
        (103, False),  # ran while the snapshot was taken
        (107, False),
        (109, True),
        (110, False),  # had not begun
        (111, False),
    ],
)
def test_below_the_horizon_the_snapshot_decides(xid: int, is_in_copy: bool) -> None:
    assert SNAPSHOT.includes(HORIZON - 1, xid) is is_in_copy


@pytest.mark.parametrize("commit_lsn", [HORIZON, HORIZON + 1])
def test_a_commit_at_or_above_the_horizon_is_never_in_the_copy(commit_lsn: int) -> None:
    """The WAL position was read after the snapshot: an xid that looks old there comes again after a crash."""
    assert not SNAPSHOT.includes(commit_lsn, 99)
    assert not SNAPSHOT.includes(commit_lsn, 102)


@pytest.mark.parametrize("epoch", [1, 7])
def test_the_streams_32_bits_are_compared_near_the_snapshots_64(epoch: int) -> None:
    wrap = epoch << 32
    snapshot = CopySnapshot(wrap - 2, wrap + 5, frozenset({wrap + 1}), HORIZON)
    before, after = 0xFFFFFFFF, 3  # on either side of the wraparound
    assert snapshot.includes(1, before - 10)
    assert snapshot.includes(1, before)
    assert snapshot.includes(1, after)
    assert not snapshot.includes(1, 1)
    assert not snapshot.includes(1, 5)
    assert not snapshot.includes(1, 1000)


@pytest.mark.parametrize("xid", [3, 1 << 31, (1 << 32) - 1])
def test_everything_holds_what_was_committed_and_what_will_be(xid: int) -> None:
    assert EVERYTHING.includes(0, xid)
    assert EVERYTHING.includes((1 << 64) - 1, xid)
