"""Pieces of a buffer put together, and messages told apart, by the many: the same as one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from live_migration.common.arrays import Reach, joined, messages_alike

SIZES = (1, 3, 13, 40)
"""Of the choices that sizes and gaps have: few of them go another way than many."""


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32), st.integers(1, 120), st.sampled_from(SIZES), st.sampled_from(SIZES), st.booleans())
@example(0, 120, 40, 40, True)
def test_pieces_are_joined_as_they_stand(seed: int, count: int, sizes: int, gaps: int, touches: bool) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, sizes, count, endpoint=True)
    between = rng.integers(0 if touches else 1, gaps, count, endpoint=True)
    starts = np.cumsum(lengths + between) - lengths
    buffer = rng.integers(0, 256, int(starts[-1] + lengths[-1]) + int(rng.integers(0, 5)), np.uint8)
    expected = b"".join(buffer[start : start + size].tobytes() for start, size in zip(starts, lengths, strict=True))
    assert joined(buffer, starts, lengths) == expected


@pytest.mark.parametrize("size", range(1, 14))
@pytest.mark.parametrize("count", [1, 9, 63, 64, 65, 200])
def test_messages_of_one_size_are_told_apart_however_short(size: int, count: int) -> None:
    message = b"IABCDEFGHIJKL"[:size]
    body = b"".join(size.to_bytes(4, "big") + bytes(4) + message for _ in range(count))
    starts, ends = messages_alike(body, 0, len(body), 8, 0, 0, 1 << 20)
    found = [body[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    assert found == [message] * len(found)
    assert len(found) <= count
    if size >= 8:
        assert len(found) == count


def test_a_search_goes_as_far_as_it_is_of_use() -> None:
    reach = Reach()
    assert reach.bytes == 8 << 10
    for used, expected in ((8 << 10, 16), (16 << 10, 32), (5 << 10, 10), (0, 8), (1 << 20, 1024), (1 << 21, 1024)):
        reach.note(used)
        assert reach.bytes == expected << 10
