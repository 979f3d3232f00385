"""Row messages of one kind and relation that follow one another in the stream, as the change log's frames, many at a time.

A frame of the stream differs from one of the log in what stands before the message only: a place for the log's head is in there, the
rest is left out, for all of them at once.
Measured: 0.1 µs a row of 60 bytes, where a loop takes 0.4 µs.
"""

from __future__ import annotations

from struct import Struct

import numpy as np

from live_migration.common.arrays import Places, leave_out, messages_alike, seen_from_each_byte
from live_migration.common.segment import FRAME

SHORTEST_SPAN = 16
"""Messages below which a span is not worth its fixed costs."""
LARGEST_MESSAGE = 1024
"""In bytes; above it the bytes themselves cost most, which are copied less often one by one."""
LARGEST_OF_MANY = 160
"""The same, where sizes differ: each byte is looked at then."""

_COPY_HEAD = Struct(">BI")
_STREAM_BYTES = 25
"""What stands before the message in CopyData: 'w', start, end, clock."""
BEFORE_MESSAGE_BYTES = _COPY_HEAD.size + _STREAM_BYTES
_COPY_DATA, _XLOG_DATA = b"dw"


class StreamSpan:
    """Messages of the stream: where each starts and ends in `data`."""

    __slots__ = ("data", "ends", "starts")

    def __init__(self, data: bytes, starts: Places, ends: Places) -> None:
        self.data = data
        self.starts = starts
        self.ends = ends

    @property
    def count(self) -> int:
        """How many messages it has."""
        return len(self.starts)

    @property
    def last(self) -> int:
        """Where the last one's CopyData begins."""
        return int(self.starts[-1]) - BEFORE_MESSAGE_BYTES

    @property
    def end(self) -> int:
        """Where the last one ends."""
        return int(self.ends[-1])

    def within(self, limit_bytes: int) -> StreamSpan:
        """Give as many of the first messages as have no more than so many bytes of frames."""
        if self.end - int(self.starts[0]) + FRAME.size <= limit_bytes if self.count else True:
            return self
        sizes = np.cumsum(self.ends - self.starts + FRAME.size)
        count = int(np.searchsorted(sizes, limit_bytes, "right"))
        return StreamSpan(self.data, self.starts[:count], self.ends[:count])

    def log_frames(self, relative_ordinal: int) -> bytes:
        """Give the change log's frames, the first of which has this ordinal."""
        sizes = self.ends - self.starts
        heads = np.empty((self.count, 2), ">u4")
        heads[:, 0] = sizes
        heads[:, 1] = np.arange(relative_ordinal, relative_ordinal + self.count)
        head_bytes = heads.view(np.uint8)
        begin, size = int(self.starts[0]) - FRAME.size, int(sizes[0])
        if (sizes == size).all():
            shape, strides = (self.count, FRAME.size + size), (BEFORE_MESSAGE_BYTES + size, 1)
            alike = np.ndarray(shape, np.uint8, self.data, begin, strides).copy()
            alike[:, : FRAME.size] = head_bytes
            return alike.tobytes()
        frames = np.frombuffer(self.data, np.uint8, self.end - begin, begin).copy()
        heads_at = seen_from_each_byte(frames, f"V{FRAME.size}", 0, len(frames))
        heads_at[self.starts - begin - FRAME.size] = head_bytes.view(f"V{FRAME.size}").ravel()
        stays = np.ones(len(frames), np.bool_)
        leave_out(stays, self.ends[:-1] - begin, BEFORE_MESSAGE_BYTES - FRAME.size)
        return frames[stays].tobytes()


def find_span(data: bytes, at: int, end: int) -> StreamSpan:
    """Give the messages, up to byte `end`, that begin as the one in the CopyData at byte `at` does; maybe none."""
    starts, ends = messages_alike(data, at, end, BEFORE_MESSAGE_BYTES, 1, _STREAM_BYTES + 4, LARGEST_OF_MANY)
    bytes_ = np.frombuffer(data, np.uint8)
    is_row = (bytes_[starts - BEFORE_MESSAGE_BYTES] == _COPY_DATA) & (bytes_[starts - _STREAM_BYTES] == _XLOG_DATA)
    count = len(starts) if is_row.all() else int(is_row.argmin())
    return StreamSpan(data, starts[:count], ends[:count])
