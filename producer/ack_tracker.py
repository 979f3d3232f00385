"""How far the slot may be moved: what was received, what of it may be confirmed, what the log says it holds."""

from __future__ import annotations


class AckTracker:
    """Tracks one replication stream. LSNs only ever rise.

    `received_lsn` is the end of the WAL that was read. `confirmable_lsn` may be recorded once all that was received so far
    is in Kafka: the end of the last whole transaction or, between transactions, the walsender's last word. `recorded_lsn`
    stands in a committed position record, and only that is ever told to the slot. `in_transaction`: a Begin was received, its Commit not.
    """

    __slots__ = ("confirmable_lsn", "in_transaction", "received_lsn", "recorded_lsn")

    def __init__(self, recorded_lsn: int) -> None:
        self.received_lsn = recorded_lsn
        self.confirmable_lsn = recorded_lsn
        self.recorded_lsn = recorded_lsn
        self.in_transaction = False

    def begin(self) -> None:
        """A Begin was received: until its Commit nothing more may be confirmed."""
        self.in_transaction = True

    def commit(self, end_lsn: int) -> None:
        """A Commit was received."""
        self.in_transaction = False
        self._rise(end_lsn)

    def keepalive(self, wal_end: int) -> None:
        """The walsender says that it has read up to `wal_end`, and has sent all that was committed below."""
        if not self.in_transaction:
            self._rise(wal_end)

    def record(self, lsn: int) -> None:
        """A position record with this confirm LSN is committed, and with it all that was received before it was made."""
        self.recorded_lsn = max(self.recorded_lsn, lsn)

    def _rise(self, lsn: int) -> None:
        if lsn > self.confirmable_lsn:  # both have only risen here
            self.received_lsn = self.confirmable_lsn = lsn
