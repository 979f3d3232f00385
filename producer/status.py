"""The producer's heartbeat for whoever shows progress."""

from __future__ import annotations

import os
import socket
import time

import psutil

from live_migration.common.control import ProducerStatus

_INTERVAL_SECONDS = 2.0


class StatusReport:
    """Counts over the process's life, and the newest positions."""

    def __init__(self) -> None:
        self._host = socket.gethostname()
        self._process = psutil.Process()
        self._changes = 0
        self._bytes = 0
        self._received_lsn = self._confirmed_lsn = self._source_lsn = 0
        self._made_at = 0.0

    def add(self, changes: int, byte_count: int) -> None:
        """Count what goes to Kafka."""
        self._changes += changes
        self._bytes += byte_count

    def update(self, received_lsn: int, confirmed_lsn: int, source_lsn: int) -> None:
        """Note where the stream is."""
        self._received_lsn = received_lsn
        self._confirmed_lsn = confirmed_lsn
        self._source_lsn = max(source_lsn, received_lsn)

    def is_due(self) -> bool:
        return time.monotonic() - self._made_at >= _INTERVAL_SECONDS

    def make(self, error: str = "") -> ProducerStatus:
        """Give the record to publish."""
        self._made_at = time.monotonic()
        return ProducerStatus(
            worker=f"producer-{self._host}-{os.getpid()}",
            host=self._host,
            pid=os.getpid(),
            seen_at=time.time(),
            received_lsn=self._received_lsn,
            confirmed_lsn=self._confirmed_lsn,
            source_lsn=self._source_lsn,
            changes=self._changes,
            bytes=self._bytes,
            rss_bytes=self._process.memory_info().rss,
            error=error,
        )
