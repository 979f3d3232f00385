"""Whole transactions in a buffer, small ones by the hundred: the messages of all of them told apart at once.

Of a transaction with a row or two, most of what it costs in a loop is its Begin and Commit.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from live_migration.common.arrays import Bytes, Places, seen_from_each_byte
from live_migration.common.pgoutput import BEGIN, COMMIT, DELETE, INSERT, UPDATE

BEGIN_BYTES, COMMIT_BYTES = 21, 26
LEAST_REACH = 32 << 10
"""How far a search for transactions goes at least, in bytes."""
_LEAST_ROW_BYTES = 8
_KEY_SHIFT = np.uint64(24)


class Transactions:
    """Transactions that follow one another in `buffer`, each a Begin, rows or none, and a Commit.

    Arrays have an element a message, where nothing else is said.
    """

    def __init__(self, buffer: bytes, starts: Places, ends: Places, kinds: Bytes) -> None:
        self.buffer = buffer
        self.starts, self.ends, self.kinds = starts, ends, kinds
        self.is_begin, is_commit = kinds == BEGIN, kinds == COMMIT
        self.is_row = ~(self.is_begin | is_commit)
        self.begins, self.commits = np.flatnonzero(self.is_begin), np.flatnonzero(is_commit)
        """Which messages they are: by transaction."""
        self.of = np.cumsum(self.is_begin) - 1
        """The transaction that each message is of."""

    @property
    def count(self) -> int:
        """How many transactions."""
        return len(self.begins)

    @property
    def message_count(self) -> int:
        """How many messages."""
        return len(self.starts)

    @property
    def row_count(self) -> int:
        """How many rows."""
        return len(self.starts) - 2 * len(self.begins)

    @property
    def end(self) -> int:
        """Where the last one ends."""
        return int(self.ends[-1])

    @property
    def commit_lsns(self) -> NDArray[np.uint64]:
        """Each transaction's commit LSN."""
        return self.words(self.starts[self.begins] + 1)

    def words(self, places: Places) -> NDArray[np.uint64]:
        """Give the numbers of eight bytes that stand at these places."""
        words = seen_from_each_byte(self.buffer, ">u8", 0, len(self.buffer))
        found: NDArray[np.uint64] = words[places].astype(np.uint64)
        return found

    def row_keys(self) -> NDArray[np.uint64]:
        """Give what each row, and nothing else, begins with: kind and relation, five bytes as a number."""
        keys: NDArray[np.uint64] = self.words(self.starts[self.is_row]) >> _KEY_SHIFT
        return keys

    def until(self, count: int) -> Self:
        """Give the first `count` transactions."""
        end = int(self.commits[count - 1]) + 1 if count else 0
        return type(self)(self.buffer, self.starts[:end], self.ends[:end], self.kinds[:end])


def whole_transactions(kinds: Bytes, sizes: Places, *, after_begin: int) -> int:
    """Give how many messages, from the first on, are transactions that are whole.

    Args:
        kinds: the messages' type bytes.
        sizes: their sizes.
        after_begin: bytes that belong to a Begin message beside its own.
    """
    is_begin, is_commit = kinds == BEGIN, kinds == COMMIT
    is_row = ((kinds == INSERT) | (kinds == UPDATE) | (kinds == DELETE)) & (sizes >= _LEAST_ROW_BYTES)
    is_good = is_begin & (sizes == BEGIN_BYTES + after_begin) | is_commit & (sizes == COMMIT_BYTES) | is_row
    is_good[:1] &= is_begin[:1]
    is_good[1:] &= is_begin[1:] == is_commit[:-1]  # a Begin behind each Commit, and nowhere else
    count = len(is_good) if is_good.all() else int(is_good.argmin())
    commits = np.flatnonzero(is_commit[:count])
    return int(commits[-1]) + 1 if len(commits) else 0
