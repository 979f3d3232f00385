"""Where the lanes of one table wait for one another: two frames of the change log, each at the beginning of a segment.

u8   'g' gather: stands in the table's first lane, the leader, before a change that concerns them all; the leader goes on once
     every other lane has arrived at this transaction
     'w' scatter: stands in each other lane before the transaction's Commit; the lane arrives there, and goes on once the
     leader has passed that Commit
u16  the leader
u16  how many lanes the table has: the leader, and those whose numbers follow
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from live_migration.common.errors import FormatError

GATHER = 0x67  # 'g', no type of pgoutput
SCATTER = 0x77  # 'w', neither
_MESSAGE = struct.Struct(">BHH")


@dataclass(frozen=True, slots=True)
class Meeting:
    """Lanes that meet in the transaction that commits at `commit_lsn`; `is_leader`: for the one that goes first."""

    lanes: range
    commit_lsn: int
    is_leader: bool

    @property
    def leader(self) -> int:
        """The lane that applies what concerns them all."""
        return self.lanes[0]


def encode_meeting(kind: int, lanes: range) -> bytes:
    """Give the message of this kind for a table's lanes."""
    return _MESSAGE.pack(kind, lanes[0], len(lanes))


def decode_meeting(message: bytes, commit_lsn: int) -> Meeting:
    """Read such a message, which stands in the transaction that commits at `commit_lsn`.

    Raises:
        FormatError: it is malformed.
    """
    try:
        kind, leader, count = _MESSAGE.unpack(message)
    except struct.error as error:
        raise FormatError(f"meeting message of {len(message)} bytes is malformed") from error
    return Meeting(range(leader, leader + count), commit_lsn, kind == GATHER)
