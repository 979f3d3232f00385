"""Whether a transaction's rows were in a table's copy already."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CopySnapshot:
    """What one table's copy saw: `pg_current_snapshot()` and the WAL position `horizon` read right after it.

    A change committed at or above `horizon` cannot be in the copy. One below it is in the copy exactly when
    its transaction is visible in the snapshot. The horizon also settles xid wraparound: no change older than the
    slot is ever asked about, so 32 bits of the xid are enough to find its 64-bit value near `xmax`.
    """

    xmin: int
    xmax: int
    in_progress: frozenset[int]
    horizon: int

    @classmethod
    def parse(cls, snapshot: str, horizon: int) -> CopySnapshot:
        """Read the text form of `pg_snapshot`: `xmin:xmax:xip,xip`."""
        xmin, xmax, in_progress = snapshot.split(":")
        xids = frozenset(int(xid) for xid in in_progress.split(",") if xid)
        return cls(int(xmin), int(xmax), xids, horizon)

    def includes(self, commit_lsn: int, xid: int) -> bool:
        """Tell whether the copy holds the changes of the committed transaction `xid` (32 bits, from a Begin message).

        `commit_lsn` is the Begin message's final LSN: the start of the commit record.
        """
        if commit_lsn >= self.horizon:
            return False
        full_xid = self._widen(xid)
        if full_xid < self.xmin:
            return True
        return full_xid < self.xmax and full_xid not in self.in_progress

    def _widen(self, xid: int) -> int:
        """Give the 64-bit xid whose low half is `xid` and that lies nearest to `xmax`."""
        distance = (xid - self.xmax) & 0xFFFFFFFF
        if distance >= 0x80000000:
            distance -= 0x100000000
        return self.xmax + distance


EVERYTHING = CopySnapshot(1 << 66, 1 << 65, frozenset(), 1 << 65)
"""Shows every change that was ever made or will be: of a table whose changes are passed over."""
