"""The stream's messages, looked at as little as possible, into the lanes' buffers.

Of a row only the type byte and the relation's oid are read. Nothing is decoded, and no object is made per row beside
the message's bytes and its frame header.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from live_migration.common import pgoutput
from live_migration.common.control import MESSAGE_PREFIX, WalMessage
from live_migration.common.errors import FormatError
from live_migration.common.lanes import lane_of
from live_migration.common.lsn import Lsn
from live_migration.common.segment import COMMIT_ORDINAL, FRAME, Position, frame
from live_migration.producer.ack_tracker import AckTracker
from live_migration.producer.batcher import LaneBuffer, Message, Record, Route

GetCopyData = Callable[[int], tuple[int, memoryview]]
"""`PGconn.get_copy_data`."""

XLOG_DATA_BYTES = 25
"""Size of what stands before a message in the stream: 'w', start, end, clock."""

_BEGIN_BYTES = 21
_COMMIT_BYTES = 26
_KEEPALIVE = struct.Struct(">BQQB")
_ROW_KINDS = (b"I", b"U", b"D")
_PREFIX = MESSAGE_PREFIX.encode() + b"\0"


class Drained(NamedTuple):
    """What `Router.drain` took: bytes of the stream, whether it would take more input to go on, whether the stream ended."""

    byte_count: int
    is_empty: bool
    has_ended: bool


class Router:
    """Takes the messages of one replication session, and gives them back as records, lane by lane.

    Changes at or below a lane's last position, which a restart brings again, are counted and dropped.
    """

    def __init__(
        self,
        *,
        migration_id: str,
        topic_id: bytes,
        segment_bytes: int,
        positions: Sequence[Position],
        acks: AckTracker,
    ) -> None:
        self._migration_id = migration_id
        self._segment_bytes = segment_bytes
        self._acks = acks
        self._lanes = [LaneBuffer(lane, topic_id, last) for lane, last in enumerate(positions)]
        self._routes: dict[bytes, Route] = {}
        # Lanes by type byte and oid of row messages that need nothing put before them any more: the fast path.
        self._ready_lanes: dict[bytes, LaneBuffer] = {}
        self._records: list[Record] = []
        self._begin = b""
        self._commit_lsn = 0
        self._ordinal = 0
        self._touched: dict[LaneBuffer, None] = {}
        self.pending_bytes = 0
        """Bytes received since the last `take`, 0 while nothing of them is for a lane."""
        self.has_changes = False
        """Whether there is something to take."""
        self.change_count = 0
        """Changes put into lanes since the session began."""
        self.is_reply_requested = False
        """Whether the walsender wants a status reply at once; whoever sends one sets it back."""

    @property
    def positions(self) -> tuple[Position, ...]:
        """Last position of each lane."""
        return tuple(lane.position for lane in self._lanes)

    def take(self) -> list[Record]:
        """Cut all lanes and give all records made since the last call: every change received so far is in them."""
        for lane in self._lanes:
            if lane.size:
                self._cut(lane)
        records, self._records = self._records, []
        self.pending_bytes = 0
        self.has_changes = False
        return records

    def drain(self, get_copy_data: GetCopyData, budget: int) -> Drained:
        """Take messages until none is whole, or `budget` bytes are exceeded.

        Raises:
            FormatError: a message is not what the protocol says.
        """
        limit = self._segment_bytes
        ready_lanes = self._ready_lanes
        pack = FRAME.pack
        ordinal = self._ordinal
        taken = length = 0
        while taken < budget:
            length, copied = get_copy_data(1)
            if length <= 0:
                break
            taken += length
            if length <= limit:
                message = bytes(copied)[XLOG_DATA_BYTES:]
                lane = ready_lanes.get(message[:5])
                if lane is not None:
                    size = lane.size + length - (XLOG_DATA_BYTES - 8)
                    if size <= limit:
                        ordinal += 1
                        parts = lane.parts
                        parts.append(pack(length - XLOG_DATA_BYTES, ordinal - lane.base))
                        parts.append(message)
                        lane.size = size
                        lane.change_count += 1
                        lane.ordinal = ordinal
                        continue
                self._ordinal = ordinal
                if message:
                    self._dispatch(message)
                else:
                    self._keepalive(bytes(copied))
            else:
                self._ordinal = ordinal
                self._dispatch(copied[XLOG_DATA_BYTES:])
                del copied
            ordinal = self._ordinal
        self._ordinal = ordinal
        self.pending_bytes = self.pending_bytes + taken if self.has_changes else 0
        return Drained(taken, length == 0, length < 0)

    def _dispatch(self, message: Message) -> None:
        match message[0]:
            case pgoutput.INSERT | pgoutput.UPDATE | pgoutput.DELETE:
                self._ordinal += 1
                self._change(message, (bytes(message[1:5]),))
            case pgoutput.BEGIN:
                self._begin_transaction(bytes(message))
            case pgoutput.COMMIT:
                self._commit(bytes(message))
            case pgoutput.RELATION:
                self._relation(bytes(message))
            case pgoutput.TRUNCATE:
                self._ordinal += 1
                self._truncate(bytes(message))
            case pgoutput.MESSAGE:
                self._logical_message(message)
            case pgoutput.TYPE | pgoutput.ORIGIN:
                pass
            case kind:
                raise FormatError(f"unknown message type {chr(kind)!r} in the replication stream after {self._where()}")

    def _begin_transaction(self, message: bytes) -> None:
        self._begin = message
        if len(message) != _BEGIN_BYTES:
            raise FormatError(f"begin message of {len(message)} bytes after {self._where()}")
        self._commit_lsn = int.from_bytes(message[1:9], "big")
        self._ordinal = 0
        self._acks.begin()

    def _commit(self, message: bytes) -> None:
        if len(message) != _COMMIT_BYTES:
            raise FormatError(f"commit message of {len(message)} bytes after {self._where()}")
        for lane in self._touched:
            if (self._commit_lsn, COMMIT_ORDINAL) > lane.position:
                if lane.size + lane.missing_bytes(()) + FRAME.size + len(message) > self._segment_bytes:
                    self._cut(lane)
                lane.prepare(self._begin, self._commit_lsn, self._ordinal, ())
                # with one lane the target commits where a segment ends with a Commit: there must be such an end
                spans_segments = lane.last.commit_lsn == self._commit_lsn
                lane.append_commit(message)
                if spans_segments and len(self._lanes) == 1:
                    self._cut(lane)
                self.has_changes = True
        self._touched.clear()
        self._ready_lanes.clear()
        self._acks.commit(int.from_bytes(message[10:18], "big"))

    def _relation(self, message: bytes) -> None:
        """Learn a relation. It comes again whenever the source's cache forgot it, mostly unchanged.

        No segment holds two shapes of one relation: a consumer that must wait until the target is altered has then
        applied all that the old shape takes.
        """
        framed = frame(message)
        oid = message[1:5]
        before = self._routes.get(oid)
        if before and before.relation_frame == framed:
            return
        if before and oid in before.lane.relations:
            self._cut(before.lane)
        relation = pgoutput.decode_relation(message)
        lane = self._lanes[lane_of(relation.name, len(self._lanes))]
        self._routes[oid] = Route(lane, framed, str(relation.name))

    def _truncate(self, message: bytes) -> None:
        truncate = pgoutput.decode_truncate(message)
        by_lane: dict[LaneBuffer, list[bytes]] = {}
        for relation_oid in truncate.relation_oids:
            oid = relation_oid.to_bytes(4, "big")
            by_lane.setdefault(self._route(oid).lane, []).append(oid)
        for oids in by_lane.values():
            own = message[:1] + len(oids).to_bytes(4, "big") + message[5:6] + b"".join(oids)
            self._change(own, tuple(oids))

    def _logical_message(self, message: Message) -> None:
        is_transactional = message[1] & 1
        if not is_transactional:
            return  # stands outside of transactions, and is not ordered with them
        self._ordinal += 1
        if bytes(message[10 : 10 + len(_PREFIX)]) != _PREFIX:
            return
        try:
            content = WalMessage.model_validate_json(pgoutput.decode_logical_message(bytes(message)).content)
        except ValidationError:
            return  # anybody may write a message of this prefix
        if content.kind == "barrier" and content.migration_id == self._migration_id:
            for lane in self._lanes:
                self._change_in(lane, message, ())

    def _change(self, message: Message, oids: tuple[bytes, ...]) -> None:
        """Put a change of relations of one lane into it."""
        routes = [(oid, self._route(oid)) for oid in oids]
        self._change_in(routes[0][1].lane, message, routes)

    def _change_in(self, lane: LaneBuffer, message: Message, routes: Sequence[tuple[bytes, Route]]) -> None:
        self._touched[lane] = None
        ordinal = self._ordinal
        if (self._commit_lsn, ordinal) <= lane.position:
            return
        self.has_changes = True
        framed_bytes = FRAME.size + len(message)
        if lane.size and lane.size + lane.missing_bytes(routes) + framed_bytes > self._segment_bytes:
            self._cut(lane)
        lane.prepare(self._begin, self._commit_lsn, ordinal - 1, routes)
        if lane.size + framed_bytes > self._segment_bytes:
            self._forget(lane)
            self.change_count += 1
            self._records.append(lane.cut_fragments(message, ordinal, self._segment_bytes))
            return
        lane.append_change(bytes(message), ordinal)
        for oid, _ in routes:
            for kind in _ROW_KINDS:
                self._ready_lanes[kind + oid] = lane

    def _cut(self, lane: LaneBuffer) -> None:
        self._forget(lane)
        self.change_count += lane.change_count
        self._records.append(lane.cut())

    def _forget(self, lane: LaneBuffer) -> None:
        """Take a lane that begins a new segment off the fast path: it needs Begin and Relation messages anew."""
        for oid in lane.relations:
            for kind in _ROW_KINDS:
                self._ready_lanes.pop(kind + oid, None)

    def _route(self, oid: bytes) -> Route:
        try:
            return self._routes[oid]
        except KeyError:
            raise FormatError(
                f"a change of relation {int.from_bytes(oid, 'big')} comes before its description, at {self._where()}"
            ) from None

    def _keepalive(self, copied: bytes) -> None:
        try:
            kind, wal_end, _, wants_reply = _KEEPALIVE.unpack(copied)
        except struct.error as error:
            raise FormatError(f"unknown replication message of {len(copied)} bytes after {self._where()}") from error
        if kind != ord("k"):
            raise FormatError(f"unknown replication message {chr(kind)!r} after {self._where()}")
        self._acks.keepalive(wal_end)
        if wants_reply:
            self.is_reply_requested = True

    def _where(self) -> str:
        return f"transaction {Lsn(self._commit_lsn)}, change {self._ordinal}"
