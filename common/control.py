"""What goes over the compacted control topic `<name>.control`: JSON values, one key a kind, the newest of each counts.

`config` is written by the coordinator for the producer; `position` by the producer in the same Kafka transaction as the segments
it speaks of; `status` by the producer for whoever shows progress; `hello` by a starting producer, to find the end of the log; `homes`
by both, the producer with the segments: which hypertables chunks belong to; in as many records as they need, `homes`, `homes/1` and so on;
`owner` by the coordinator that made the topics: whose they are.
"""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from collections.abc import Mapping

import orjson
from pydantic import BaseModel, ConfigDict

from live_migration.common.lanes import LaneMap
from live_migration.common.relation import QualifiedName

CONFIG = b"config"
POSITION = b"position"
STATUS = b"status"
HELLO = b"hello"
HOMES = b"homes"
OWNER = b"owner"
HOMES_A_RECORD = 10_000
"""Some 100 kB packed; the topic takes 2 MiB."""

MESSAGE_PREFIX = "live_migration"
"""Prefix of our logical messages in the source's WAL."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Owner(_Record):
    """Whose topics these are. `target`: host:port/database, for people."""

    migration_id: str
    target: str = ""


class ProducerConfig(_Record):
    """What the producer must know. LSNs are integers."""

    migration_id: str
    topic_id: str
    slot: str
    publications: tuple[str, ...]
    binary: bool
    lane_count: int
    split: tuple[tuple[str, str, int], ...] = ()
    """Tables with lanes of their own, the last ones of `lane_count`: schema, name, how many."""
    system_identifier: str
    timeline: int
    start_lsn: int
    """The slot's consistent point: the log begins there."""
    publication_change: int = 0
    """Raised after each change of a publication: the producer then reconnects its walsender."""
    is_ended: bool = False
    """Whether `clean` takes the migration away: that the slot is gone then is no loss."""

    @property
    def lane_map(self) -> LaneMap:
        """The change log's lanes."""
        own = tuple((QualifiedName(schema, name), count) for schema, name, count in self.split)
        return LaneMap(self.lane_count - sum(count for _, count in own), own)


class LogPosition(_Record):
    """How far the change log reaches; true exactly when the transaction that carries it is committed."""

    confirm_lsn: int
    """End of the last source transaction that is wholly in Kafka: the slot may be moved up to here."""
    lanes: tuple[tuple[int, int], ...]
    """Last position of each lane: commit LSN, ordinal."""
    change: tuple[int, int, int, int] | None = None
    """Where the log ends within a transaction: commit LSN, LSN, number, ordinal of the last change (`producer.last_change`)."""
    system_identifier: str
    timeline: int
    sent_at: float
    """Unix time."""


Homes = dict[str, tuple[str, ...]]
"""Where relations belong, as it is kept: a relation's name in SQL to (hypertable's schema, name, chunk's schema, name, 'z' or '')."""


class _PackedHomes(_Record):
    """`packed`: JSON, compressed, in base85, as they may be many."""

    packed: str


def pack_homes(homes: Homes, kept: int = 0) -> list[tuple[bytes, bytes]]:
    """Give the records, key and value, that say more than those that hold the first `kept` of these: nothing is ever taken out."""
    items = list(homes.items())
    if len(items) <= kept:
        return []
    first = kept // HOMES_A_RECORD
    return [
        (_homes_key(number), _pack(dict(items[number * HOMES_A_RECORD : (number + 1) * HOMES_A_RECORD])))
        for number in range(first, -(-len(items) // HOMES_A_RECORD))
    ]


def unpack_homes(records: Mapping[bytes, bytes]) -> Homes:
    """Give what records of the control topic hold. Raises ValueError when one is malformed."""
    homes: Homes = {}
    number = 0
    while (value := records.get(_homes_key(number))) is not None:
        try:
            content = orjson.loads(zlib.decompress(b85decode(_PackedHomes.model_validate_json(value).packed)))
        except zlib.error as error:
            raise ValueError(str(error)) from error
        homes.update((name, tuple(home)) for name, home in content.items())
        number += 1
    return homes


def _homes_key(number: int) -> bytes:
    return HOMES if number == 0 else HOMES + b"/%d" % number


def _pack(homes: Homes) -> bytes:
    packed = b85encode(zlib.compress(orjson.dumps(homes))).decode()
    return _PackedHomes(packed=packed).model_dump_json().encode()


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
    """Content of our logical messages: `barrier` and `call` are repeated in every lane, `heartbeat` only moves the slot.

    A lane that has passed a `call` looks in the state for chunks that it has to copy.
    """

    kind: str
    migration_id: str
    id: str
