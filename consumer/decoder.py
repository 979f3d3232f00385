"""Segments to batches: the changes of each table, without those that its copy already holds."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import orjson

from live_migration.common import control, pgoutput
from live_migration.common.arrays import Reach
from live_migration.common.errors import FormatError
from live_migration.common.home import HOME, SUSPECT, Home, decode_home, decode_suspect
from live_migration.common.meeting import GATHER, SCATTER, decode_meeting
from live_migration.common.relation import QualifiedName, Relation, ReplicaIdentity
from live_migration.common.segment import FRAME, Position
from live_migration.common.transactions import LEAST_REACH
from live_migration.consumer.lane_meeting import LanesMeet
from live_migration.consumer.row_encoding import BIG_BYTES, Message, message_form
from live_migration.consumer.spans import SHORTEST_SPAN, Span, find_span, messages_of
from live_migration.consumer.target_tables import ChunkChangedUnseen, RelationRefused, Resolution, TargetTable
from live_migration.consumer.transactions import Marks, TableRows, find_transactions

if TYPE_CHECKING:
    from live_migration.consumer.net_changes import NotPlain, Plain

_BEGIN = struct.Struct(">BQqIQ")
"""A Begin message, and the base that the log puts behind it."""
_ROW_HEAD = struct.Struct(">II8s")
"""A frame's head, and what its message begins with: kind, relation, the tuple's kind, how many values it has."""
_CREDIT = 1024
_WORTH_ROWS = 64
"""Rows that pay for a search, of a span or of transactions. Where there are less too often, spans are given up until the next batch."""
_TRANSACTIONS_BYTES = 1024
"""What must be there for a look whether there are small transactions."""
_WORTH_ROWS_A_TABLE = 16
"""Of small transactions, with which the work for each table pays."""
_LOOKS = 2
"""In a segment, in vain."""
_TAKES_ROWS = frozenset((pgoutput.INSERT, pgoutput.UPDATE, pgoutput.DELETE))


class Decoded(NamedTuple):
    """A transaction of the stream. `xid`: its lower 32 bits."""

    commit_lsn: int
    xid: int


class Mark(NamedTuple):
    """Where in a run a transaction begins: which message, its commit LSN, what its ordinals count from."""

    row: int
    commit_lsn: int
    base: int


class RelationResolver(Protocol):
    """Finds the target's table of a relation."""

    async def resolve(self, relation: Relation, home: Home | None) -> Resolution: ...


class TableRun:
    """Row messages of one table, of one shape, in source order."""

    __slots__ = ("_marks", "_messages", "_ordinals", "_pieces", "count", "net", "only_inserts", "table")

    def __init__(self, table: TargetTable) -> None:
        self.table = table
        self.count = 0
        self._marks: list[Mark | Marks] = []
        self.only_inserts = True
        self.net: Plain | NotPlain | None = None
        """What `net_changes.work_ahead` found, until it is taken."""
        self._pieces: list[Span | tuple[list[Message], list[int]]] = []
        self._open_list()

    def _open_list(self) -> None:
        self._messages: list[Message] = []
        self._ordinals: list[int] = []  # less the base of the mark before
        self._pieces.append((self._messages, self._ordinals))

    def mark(self, commit_lsn: int, base: int) -> None:
        """Note that the next message is a transaction's first. `base`: what its ordinals count from."""
        self._marks.append(Mark(self.count, commit_lsn, base))

    def marks(self) -> Iterator[Mark]:
        """Give where transactions begin."""
        for each in self._marks:
            if isinstance(each, Mark):
                yield each
            else:
                yield from map(Mark, each.rows.tolist(), each.commit_lsns.tolist(), each.bases.tolist())

    def add(self, message: Message, relative_ordinal: int) -> None:
        """Add a message. `relative_ordinal` counts from the base of the newest mark."""
        self._messages.append(message)
        self._ordinals.append(relative_ordinal)
        self.count += 1

    def add_alike(self, body: bytes, start: int, at: int) -> int:
        """Add the frames from `at` on that are of the kind and relation of the one whose message stands at `start`; give where they end."""
        unpack, prefix, end = _ROW_HEAD.unpack_from, body[start : start + 8], len(body)
        add_message, add_ordinal = self._messages.append, self._ordinals.append
        before, last_place = len(self._messages), end - _ROW_HEAD.size
        while at <= last_place:
            length, relative, found = unpack(body, at)
            start = at + 8
            following = start + length
            if found != prefix or following > end or not 8 <= length < BIG_BYTES:
                break
            add_message(body[start:following])
            add_ordinal(relative)
            at = following
        self.count += len(self._messages) - before
        return at

    def add_span(self, span: Span) -> None:
        """Add messages that are of one kind and relation."""
        self._pieces.append(span)
        self._open_list()
        self.count += span.row_count

    def add_rows(self, rows: TableRows) -> None:
        """Add rows of whole transactions."""
        self._marks.append(rows.marks(self.count))
        self.only_inserts &= rows.are_inserts
        span = rows.span()
        if span is not None:
            self.add_span(span)
            return
        self._messages += rows.messages()
        self._ordinals += rows.ordinals()
        self.count += rows.count

    def pieces(self) -> Iterator[Span | list[Message]]:
        """Give the run as it came: spans, and other messages between them."""
        for piece in self._pieces:
            if isinstance(piece, Span):
                yield piece
            elif piece[0]:
                yield piece[0]

    def is_binary(self) -> bool:
        """Tell whether the values are binary, by the first that is not NULL."""
        forms = map(message_form, messages_of(self.pieces()))
        return next((form for form in forms if form is not None), False)

    def messages(self) -> list[Message]:
        """Give all messages."""
        return list(messages_of(self.pieces()))

    def ordinals(self) -> list[int]:
        """Give each message's ordinal, less the base of the mark before it."""
        ordinals: list[int] = []
        for piece in self._pieces:
            ordinals += map(piece.ordinal, range(piece.row_count)) if isinstance(piece, Span) else piece[1]
        return ordinals

    def position(self, index: int) -> Position:
        """Give the position of the run's message number `index`."""
        commit_lsn, base = 0, 0
        for start, mark_lsn, mark_base in self.marks():
            if start > index:
                break
            commit_lsn, base = mark_lsn, mark_base
        return Position(commit_lsn, base + self._relative_ordinal(index))

    def _relative_ordinal(self, index: int) -> int:
        for piece in self._pieces:
            count = piece.row_count if isinstance(piece, Span) else len(piece[1])
            if index < count:
                return piece.ordinal(index) if isinstance(piece, Span) else piece[1][index]
            index -= count
        raise IndexError(index)


class TruncateStep:
    """Tables to empty, after everything before and before everything after."""

    __slots__ = ("position", "tables")

    def __init__(self, tables: list[TargetTable], position: Position) -> None:
        self.tables = tables
        self.position = position


Step = dict[QualifiedName, list[TableRun]] | TruncateStep
"""Runs by table of the target, independent of one another between tables; or a truncate."""


class Batch:
    """What one target transaction, or one flush of it, applies."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.change_count = 0
        self.byte_count = 0
        self.run_count = 0
        self.barrier: str | None = None
        self.commit_time: int | None = None
        self.is_inside_transaction = False
        self.must_end_at_commit = False
        self.suspects: dict[int, Home] = {}
        self.is_called = False

    def is_empty(self) -> bool:
        """Tell whether there is nothing to write but the checkpoint."""
        return not self.steps

    def runs(self) -> dict[QualifiedName, list[TableRun]]:
        """Give the runs that the next change goes into."""
        if not self.steps or isinstance(self.steps[-1], TruncateStep):
            self.steps.append({})
        last = self.steps[-1]
        assert isinstance(last, dict)
        return last


class _Known:
    """A relation of the stream: its message, its table or why there is none, and whether the present transaction's changes
    are in the table's copy."""

    __slots__ = ("_credit", "_reach", "_table", "message", "relation", "run", "serial", "skips", "snapshot", "step")

    def __init__(self, message: bytes, relation: Relation, found: Resolution | RelationRefused) -> None:
        self.message = message
        self.relation = relation
        self._table = found.table if isinstance(found, Resolution) else found
        self.snapshot = found.snapshot
        self.serial = -1
        self.skips = False
        self.run: TableRun | None
        self._reach = Reach()
        self.refresh()

    def refresh(self) -> None:
        """Begin a batch: let go of the one before, and look for spans again if that was given up."""
        self.run = None
        self.step: object = None
        self._credit = _CREDIT

    def span(self, body: bytes, at: int) -> Span | None:
        """Give the frames that begin with the one at byte `at`, None where they are few, or have been for too often."""
        if self._credit < 0:
            return None
        span = find_span(body, at, at + self._reach.bytes)
        self._reach.note(span.end - at if span is not None else 0)
        count = span.row_count if span is not None else 0
        self._credit = min(self._credit + count - _WORTH_ROWS, _CREDIT)
        return span if count >= SHORTEST_SPAN else None

    def takes_all_from(self, commit_lsn: int) -> bool:
        """Tell whether the target takes the rows of all transactions from a commit LSN on, none being in the table's copy."""
        return not isinstance(self._table, RelationRefused) and (
            self.snapshot is None or commit_lsn >= self.snapshot.horizon
        )

    @property
    def table(self) -> TargetTable:
        """The target's table. Raises RelationRefused where it cannot take the rows, which only counts for those not in the copy."""
        if isinstance(self._table, RelationRefused):
            raise self._table
        return self._table


class LaneDecoder:
    """Decodes one lane's segments in order; a new one after each acquisition of the lane."""

    def __init__(self, tables: RelationResolver, migration_id: str, met_lsn: int = 0) -> None:
        self._tables = tables
        self._met_lsn = met_lsn  # the last transaction in which the lane has met those of its table
        self._migration_id = migration_id
        self._known: dict[int, _Known] = {}
        self._homes: dict[int, Home] = {}
        self._here: set[int] = set()  # relations of the present segment, by oid
        self._serial = 0
        self._reach = Reach(LEAST_REACH)
        self._commit_lsn = self._xid = self._base = 0
        self._inside = False
        self._batch: Batch | None = None
        self.suspects: dict[int, Home] = {}
        """All that were met so far, those included whose batch may never be applied."""

    def note_met(self, commit_lsn: int) -> None:
        """Take note that the lane has met those of its table in the transaction with this commit LSN."""
        self._met_lsn = commit_lsn

    @property
    def decoded(self) -> Decoded:
        """The transaction that was decoded last."""
        return Decoded(self._commit_lsn, self._xid)

    async def decode(self, body: bytes, batch: Batch) -> None:
        """Add a segment's changes to a batch.

        Raises:
            LaneStopped: the target cannot take a relation's rows.
            LanesMeet: the segment begins where other lanes are to be waited for; nothing of it is in the batch.
            FormatError: the segment is malformed.
        """
        if batch is not self._batch:
            self._open_batch(batch)
        try:
            await self._decode(body, batch)
        except (struct.error, IndexError) as error:
            raise FormatError(f"segment of {len(body)} bytes is malformed: {error}") from error

    def _open_batch(self, batch: Batch) -> None:
        """Let go of the batch before: a relation that falls quiet must not keep its last batch's messages alive."""
        self._batch = batch
        for known in self._known.values():
            known.refresh()

    async def _decode(self, body: bytes, batch: Batch) -> None:
        at, end = 0, len(body)
        batch.byte_count += end
        unpack, from_bytes = FRAME.unpack_from, int.from_bytes
        step: object = batch.steps[-1] if batch.steps else None
        looks, self._here = _LOOKS, set()
        has_commit = False  # before it a segment has relations among its rows
        while at < end:
            if at + 8 > end:
                raise FormatError(f"segment ends within a frame at byte {at}")
            length, relative = unpack(body, at)
            start = at + 8
            at = start + length
            if at > end or not length:
                raise FormatError(f"segment ends within a frame at byte {start}")
            kind = body[start]
            if kind == pgoutput.BEGIN and length == _BEGIN.size:  # here, for there may be one for each change
                if has_commit and looks and end - start >= _TRANSACTIONS_BYTES:
                    looks, before = looks - 1, batch.change_count
                    if taken := self._take_transactions(body, start - FRAME.size, batch):
                        looks = _LOOKS if batch.change_count - before >= _WORTH_ROWS else looks
                        at = taken
                        step = batch.steps[-1] if batch.steps else None
                        continue
                _, commit_lsn, batch.commit_time, self._xid, self._base = _BEGIN.unpack_from(body, start)
                self._commit_lsn = commit_lsn
                self._serial += 1
                self._inside = True
            elif kind == pgoutput.COMMIT:
                self._inside, has_commit = False, True
            elif kind in _TAKES_ROWS:
                known = self._known.get(from_bytes(body[start + 1 : start + 5], "big"))
                if known is None:
                    raise FormatError(f"segment has a row at byte {start} before its relation")
                if known.serial != self._serial:
                    self._enter(known)
                if known.skips:
                    continue
                run = known.run
                if run is None or known.step is not step:
                    run = self._open_run(known, batch)
                    step = known.step
                if kind != pgoutput.INSERT:
                    run.only_inserts = False
                before = run.count
                if _are_alike(body, start, at) and (span := known.span(body, start - FRAME.size)) is not None:
                    run.add_span(span)
                    at = span.end
                else:
                    run.add(body[start:at] if length < BIG_BYTES else memoryview(body)[start:at], relative)
                    at = run.add_alike(body, start, at)
                batch.change_count += run.count - before
            else:
                await self._other(kind, body[start:at], relative, batch)
                step = batch.steps[-1] if batch.steps else None
        batch.is_inside_transaction = self._inside

    def _take_transactions(self, body: bytes, at: int, batch: Batch) -> int:
        """Take the whole transactions from the Begin on that stands at byte `at`, where all of them are rows that the target takes.

        Gives where the last one ends; 0 where the first one is for the loop.
        """
        found = find_transactions(body, at, at + self._reach.bytes, self._here)
        self._reach.note(found.end - at if found is not None else 0)
        if found is None:
            return 0
        oids = found.relations()
        if found.row_count < _WORTH_ROWS_A_TABLE * len(oids):
            return 0
        known = [self._known[oid] for oid in oids]
        first_lsn = int(found.commit_lsns[0])
        if not all(each.takes_all_from(first_lsn) for each in known):
            return 0
        runs = [self._run(each, batch) for each in known]
        numbers = {id(run): number for number, run in enumerate(runs)}
        for number, rows in found.by_table({oid: numbers[id(run)] for oid, run in zip(oids, runs, strict=True)}):
            runs[number].add_rows(rows)
            batch.change_count += rows.count
        _, self._commit_lsn, batch.commit_time, self._xid, self._base = _BEGIN.unpack(found.last_begin())
        return found.end

    def _enter(self, known: _Known) -> None:
        """Note that a relation's next changes are of the present transaction."""
        known.serial = self._serial
        snapshot = known.snapshot
        known.skips = snapshot is not None and snapshot.includes(self._commit_lsn, self._xid)
        if known.run is not None:
            known.run.mark(self._commit_lsn, self._base)

    def _open_run(self, known: _Known, batch: Batch) -> TableRun:
        """Give the run of the batch's last step that a relation's changes go into, those of the present transaction first."""
        run = self._run(known, batch)
        run.mark(self._commit_lsn, self._base)
        return run

    def _run(self, known: _Known, batch: Batch) -> TableRun:
        """Give the run of the batch's last step that a relation's changes go into."""
        if known.run is not None and batch.steps and known.step is batch.steps[-1]:
            return known.run
        table = known.table
        runs = batch.runs()
        table_runs = runs.setdefault(table.name, [])
        if not table_runs or not table_runs[-1].table.takes_rows_of(table):
            table_runs.append(TableRun(table))
            batch.run_count += 1
        run = table_runs[-1]
        known.run, known.step = run, runs
        if table.is_deferrable:
            batch.must_end_at_commit = True
        return run

    async def _other(self, kind: int, message: bytes, relative: int, batch: Batch) -> None:
        match kind:
            case pgoutput.BEGIN:
                raise FormatError(f"begin message of {len(message)} bytes, with its base, is not {_BEGIN.size} long")
            case pgoutput.RELATION:
                await self._learn(message, batch)
            case pgoutput.TRUNCATE:
                self._truncate(message, relative, batch)
            case pgoutput.MESSAGE:
                self._logical_message(message, batch)
            case _ if kind == HOME:
                oid, home = decode_home(message)
                self._homes[oid] = home
            case _ if kind == SUSPECT:
                oid = decode_suspect(message)
                self._suspect(oid, self._homes[oid], batch)
            case _ if kind in (GATHER, SCATTER):
                if self._commit_lsn > self._met_lsn:
                    raise LanesMeet(decode_meeting(message, self._commit_lsn))
            case pgoutput.TYPE | pgoutput.ORIGIN:
                pass
            case _:
                raise FormatError(f"segment has a message of unknown type {chr(kind)!r}")

    async def _learn(self, message: bytes, batch: Batch) -> None:
        oid = pgoutput.relation_oid(message)
        known = self._known.get(oid)
        if known is None or known.message != message:
            relation = pgoutput.decode_relation(message)
            try:
                found: Resolution | RelationRefused = await self._tables.resolve(relation, self._homes.get(oid))
            except RelationRefused as refusal:
                found = refusal
            known = self._known[oid] = _Known(message, relation, found)
        self._here.add(oid)
        home = self._homes.get(oid)
        if home is not None and home.is_compressed and known.relation.identity is not ReplicaIdentity.FULL:
            # Rows that were compressed at once, say: those are copied, but what is deleted of them from here on is not told yet.
            self._suspect(oid, home, batch)

    def _suspect(self, oid: int, home: Home, batch: Batch) -> None:
        batch.suspects[oid] = self.suspects[oid] = home

    def _truncate(self, message: bytes, relative: int, batch: Batch) -> None:
        """Empty the tables named. A TRUNCATE of a hypertable names its chunks, too, and is one of the target's hypertable."""
        oids = pgoutput.decode_truncate(message).relation_oids
        tables: dict[str, TargetTable] = {}
        names = set()
        for oid in oids:
            if oid not in self._known:
                raise FormatError(f"segment truncates relation oid {oid} before describing it")
            names.add(self._known[oid].relation.name)
        for oid in oids:
            known, home = self._known[oid], self._homes.get(oid)
            if known.serial != self._serial:
                self._enter(known)
            if known.skips or (home is not None and home.is_compressed):
                continue
            if home is not None and home.hypertable not in names:  # a chunk alone
                raise ChunkChangedUnseen(home, known.relation, known.snapshot)
            tables[known.table.sql] = known.table
        if tables:
            position = Position(self._commit_lsn, self._base + relative)
            batch.steps.append(TruncateStep(list(tables.values()), position))
            batch.change_count += 1

    def _logical_message(self, message: bytes, batch: Batch) -> None:
        logical = pgoutput.decode_logical_message(message)
        if logical.prefix != control.MESSAGE_PREFIX:
            return
        content = orjson.loads(logical.content)
        if content.get("migration_id") != self._migration_id:
            return
        if content.get("kind") == "barrier":
            batch.barrier = content["id"]
        elif content.get("kind") == "call":
            batch.is_called = True


def _are_alike(body: bytes, start: int, at: int) -> bool:
    """Tell whether as many frames follow from byte `at` on as may be worth a search, which begin as the one whose message stands at `start`."""
    prefix = body[start : start + 8]
    for _ in range(SHORTEST_SPAN):
        start = at + FRAME.size
        if body[start : start + 8] != prefix:
            return False
        at = start + int.from_bytes(body[at : at + 4], "big")
    return True


def all_runs(step: dict[QualifiedName, list[TableRun]]) -> Iterator[TableRun]:
    """Give the runs of a step, each table's in their order."""
    for runs in step.values():
        yield from runs
