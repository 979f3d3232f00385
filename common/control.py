"""What goes over the compacted control topic `<name>.control`: JSON values, one key a kind, the newest of each counts.

`config` is written by the coordinator for the producer; `position` by the producer in the same Kafka transaction as the segments
it speaks of; `status` by the producer for whoever shows progress; `hello` by a starting producer, to find the end of the log.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

CONFIG = b"config"
POSITION = b"position"
STATUS = b"status"
HELLO = b"hello"

MESSAGE_PREFIX = "live_migration"
"""Prefix of our logical messages in the source's WAL."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ProducerConfig(_Record):
    """What the producer must know. LSNs are integers."""

    migration_id: str
    topic_id: str
    slot: str
    publications: tuple[str, ...]
    binary: bool
    lane_count: int
    system_identifier: str
    timeline: int
    start_lsn: int
    """The slot's consistent point: the log begins there."""
    publication_change: int = 0
    """Raised after each change of a publication: the producer then reconnects its walsender."""


class LogPosition(_Record):
    """How far the change log reaches; true exactly when the transaction that carries it is committed."""

    confirm_lsn: int
    """End of the last source transaction that is wholly in Kafka: the slot may be moved up to here."""
    lanes: tuple[tuple[int, int], ...]
    """Last position of each lane: commit LSN, ordinal."""
    system_identifier: str
    timeline: int
    sent_at: float
    """Unix time."""


class ProducerStatus(_Record):
    """A producer's heartbeat, for `status`."""

    worker: str
    host: str
    pid: int
    seen_at: float
    received_lsn: int
    """End of the WAL that was received."""
    confirmed_lsn: int
    """What the slot was moved to."""
    source_lsn: int
    """The walsender's last word on the end of the source's WAL."""
    changes: int
    """Changes put into Kafka since the process started."""
    bytes: int
    rss_bytes: int
    error: str = ""


class WalMessage(_Record):
    """Content of our logical messages: `barrier` is repeated in every lane, `heartbeat` only moves the slot."""

    kind: str
    migration_id: str
    id: str
