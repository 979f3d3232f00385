"""Which change of a transaction was received last, told so that another session of the stream finds it again.

An ordinal counts what one session was sent, and two sessions may be sent different changes of one transaction: whether a relation
is published is what each walsender's cache says when it decodes, by what it has decoded before. A table that joins a publication
while a transaction with changes of it is open is in that transaction for one session, and is not for the next. What is the same
for all is the LSN of the WAL record that a change is decoded from, and its number among the changes of that record: those are of one
relation (a COPY writes the rows of a page in one record), so that they are sent together or not at all.
"""

from __future__ import annotations

from typing import NamedTuple

from live_migration.producer.spans import BEFORE_MESSAGE_BYTES

_STREAM_AT = 5
"""Where what CopyData holds begins: 'w', start, end, clock, then the message."""
_LSN_BYTES = 8
_COUNTED = b"IUDTM"


class LastChange(NamedTuple):
    """The last change received of a transaction whose Commit is not."""

    commit_lsn: int
    lsn: int
    """Of the WAL record that it is decoded from."""
    number: int
    """Among the changes of that record, from 1."""
    ordinal: int
    """Of the session that received it; none of the log's is higher."""


class ChangeTail:
    """The LSN of the last change, and how many changes there were of it: found from the messages' heads, without a look at each."""

    __slots__ = ("lsn", "number")

    def __init__(self) -> None:
        self.lsn = -1
        self.number = 0

    def restart(self) -> None:
        """Begin anew with a transaction: a message at the end of another may bear the LSN that its first change has."""
        self.lsn = -1
        self.number = 0

    def note(self, data: bytes | memoryview, last: int, end: int, begin: int = 0) -> None:
        """Take note of a transaction's CopyData messages from `begin` in `data` to `end`, of which that at `last` is the last change.

        A row that holds its own LSN, so as it stands before it here, was written by somebody who foresaw it.
        """
        head = bytes(data[last + _STREAM_AT : last + _STREAM_AT + 1 + 2 * _LSN_BYTES])
        lsn = int.from_bytes(head[1 : 1 + _LSN_BYTES], "big")
        number = _count(data, head, begin, end) if isinstance(data, bytes) else 1
        self.number = self.number + number if lsn == self.lsn else number
        self.lsn = lsn


def _count(data: bytes, head: bytes, begin: int, end: int) -> int:
    number = 0
    at = data.find(head, begin, end)
    while at >= 0:
        kind = at - _STREAM_AT + BEFORE_MESSAGE_BYTES
        number += data[kind] in _COUNTED
        at = data.find(head, kind, end)
    return number
