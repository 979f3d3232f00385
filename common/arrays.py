"""Bytes seen through NumPy: what the loops over many rows are made of. Nothing of it is used but arrays of integers and of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.intp]
"""Places in a buffer, in bytes."""
Bytes = NDArray[np.uint8]
HEAD_BYTES = 8
"""That messages of one form begin with: in a row message its kind, relation, the tuple's kind, how many values it has."""
_WORTH_MESSAGES = 64
"""Of one size, with which a search for others is not worth it."""
_FEW_SIZES = 12
"""Of pieces, that are worth to be taken together."""
_FEW_PIECES = 64
"""Which are sooner put together one by one."""
_LEAST_REACH, _MOST_REACH = 8 << 10, 1 << 20
"""A search takes some 20 bytes for each that is like the messages' kind, at worst."""


class Reach:
    """How far a search goes, in bytes: twice as far as the last one was of use, so that searches cost little more than they save."""

    __slots__ = ("_least", "bytes")

    def __init__(self, least: int = _LEAST_REACH) -> None:
        self.bytes = self._least = least

    def note(self, used: int) -> None:
        """Take note how many bytes the last search was of use for."""
        self.bytes = min(max(self._least, 2 * used), _MOST_REACH)


def seen_from_each_byte(buffer: bytes | NDArray[Any], number: str, at: int, end: int) -> NDArray[Any]:
    """Give the numbers that begin at each byte from `at` on and end before `end`. Nothing is copied.

    Args:
        buffer: what they are read from, or written to.
        number: as NumPy names it: ">u4" say, or "V22" for so many bytes.
        at: the first byte.
        end: where the last one ends, at the latest.
    """
    size = np.dtype(number).itemsize
    return np.ndarray((max(0, end - at - size + 1),), number, buffer, at, (1,))


def leave_out(stays: NDArray[np.bool_], places: Places, count: int) -> None:
    """Mark `count` bytes from each place on as those that go. Measured: 4 ns a place, however many bytes."""
    seen_from_each_byte(stays, f"V{count}", 0, len(stays))[places] = np.zeros((), f"V{count}")


def joined(buffer: Bytes, starts: Places, sizes: Places) -> bytes:
    """Give some pieces of a buffer, one behind the other: those of a size together, where there are few sizes."""
    distinct = np.unique(sizes).tolist() if len(sizes) > _FEW_PIECES else ()
    if 0 < len(distinct) <= _FEW_SIZES:
        to = np.cumsum(sizes)
        pieces = np.empty(int(to[-1]), np.uint8)
        for size in distinct:
            are_of_size = sizes == size
            found = seen_from_each_byte(buffer, f"V{size}", 0, len(buffer))[starts[are_of_size]]
            seen_from_each_byte(pieces, f"V{size}", 0, len(pieces))[to[are_of_size] - size] = found
        return pieces.tobytes()
    view = buffer.data
    return b"".join([view[start:end] for start, end in zip(starts.tolist(), (starts + sizes).tolist(), strict=True)])


def following(starts: Places, ends: Places, gap: int, end: int) -> int:
    """Give how many places, from the first on, follow one another with a gap of so many bytes, and end before `end`. There is one at least."""
    follow = ends[:-1] + gap == starts[1:]
    count = len(starts) if follow.all() else int(follow.argmin()) + 1
    return count if ends[count - 1] <= end else count - 1


def messages_alike(
    buffer: bytes, at: int, end: int, head_bytes: int, size_at: int, rest: int, largest: int
) -> tuple[Places, Places]:
    """Find messages that follow one another in frames of one form and begin with the same eight bytes.

    Where these bytes stand is a search over all bytes, and the frames' sizes say which of the places are messages: each frame must
    end where the next one begins. What stands in a message is never taken for one.

    Args:
        buffer: what holds the frames.
        at: where the first frame begins.
        end: where to stop; a message that ends behind it is not given.
        head_bytes: what stands before a message in its frame.
        size_at: where the size, four bytes, stands in that.
        rest: what the message has less than the size says.
        largest: size of the first message up to which those of other sizes are searched for.

    Gives where each message starts and ends, maybe none.
    """
    heads = seen_from_each_byte(buffer, "<u8", at, end)
    if len(heads) <= head_bytes:
        return np.empty(0, np.intp), np.empty(0, np.intp)
    sizes = seen_from_each_byte(buffer, ">u4", at, end)
    size = int(sizes[size_at]) - rest
    count = _of_one_size(heads, sizes, head_bytes, size_at, head_bytes + size)
    if count >= _WORTH_MESSAGES or size > largest:
        starts = np.arange(at + head_bytes, at + head_bytes + count * (head_bytes + size), head_bytes + size)
        return starts, starts + size
    kinds = np.frombuffer(buffer, np.uint8, len(heads) - head_bytes, at + head_bytes)
    places = np.flatnonzero(kinds == kinds[0]) + head_bytes
    starts = places[heads[places] == heads[head_bytes]]
    ends = starts + sizes[starts - head_bytes + size_at] - rest
    count = following(starts, ends, head_bytes, end - at)
    return starts[:count] + at, ends[:count] + at


def _of_one_size(
    heads: NDArray[np.generic], sizes: NDArray[np.generic], head_bytes: int, size_at: int, stride: int
) -> int:
    """Give how many whole frames, the first included, follow one another whose messages begin alike and have one size."""
    most = (len(sizes) + 3) // stride if stride >= head_bytes + HEAD_BYTES else 0
    heads, sizes = heads[head_bytes::stride][:most], sizes[size_at::stride][:most]
    are_alike = (heads == heads[:1]) & (sizes == sizes[:1])
    return len(are_alike) if are_alike.all() else int(are_alike.argmin())
