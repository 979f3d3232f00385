"""From COPY out of the source straight into COPY on the target: bytes untouched, memory bounded in bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import asyncpg

from live_migration.common.postgres import while_connected
from live_migration.common.relation import QualifiedName, quote_identifier
from live_migration.common.tasks import TaskGroup
from live_migration.consumer.copy_errors import TableStopped, leading_error, server_errors
from live_migration.consumer.parts import BlockRange

PIPE_BYTES = 4 << 20
"""What may wait between the two servers; one value larger than this passes too, alone."""
SLICE_BYTES = 256 << 10
"""A big value goes to the target in slices of this, for asyncpg copies what it is given before it sends it."""


@dataclass(frozen=True, slots=True)
class CopyCount:
    """What a COPY moved."""

    rows: int
    bytes: int


class BytePipe:
    """A queue of buffers for one writer and one reader, full at a number of bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._chunks: deque[bytes | bytearray] = deque()
        self._waiting_bytes = 0
        self._is_closed = False
        self._changed = asyncio.Event()
        self.total_bytes = 0

    async def write(self, chunk: bytes | bytearray) -> None:
        """Put a buffer in, which is not used by the caller any more; waits while the pipe is full."""
        while self._waiting_bytes and self._waiting_bytes + len(chunk) > self._limit:
            await self._wait()
        self._chunks.append(chunk)
        self._waiting_bytes += len(chunk)
        self.total_bytes += len(chunk)
        self._changed.set()

    def close(self) -> None:
        """Say that everything was written. A pipe that is not closed has no end: its reader never takes a part for the whole."""
        self._is_closed = True
        self._changed.set()

    async def read(self) -> AsyncIterator[memoryview]:
        """Give what was written, in slices."""
        while True:
            if self._chunks:
                chunk = self._chunks.popleft()
                view = memoryview(chunk)
                for start in range(0, len(view), SLICE_BYTES):
                    yield view[start : start + SLICE_BYTES]
                self._waiting_bytes -= len(chunk)
                del view, chunk
                self._changed.set()
            elif self._is_closed:
                return
            else:
                await self._wait()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """How a table's rows travel: the columns copied, and the format.

    `target`: where they go if not into the table of the same name. `decompresses`: the source is a chunk, whose compressed rows
    are asked for, too.
    """

    name: QualifiedName
    columns: tuple[str, ...]
    is_binary: bool
    target: QualifiedName | None = None
    decompresses: bool = False

    @property
    def format(self) -> str:
        return "binary" if self.is_binary else "text"

    def query(self, blocks: BlockRange) -> str:
        """Give the query for the rows in a range of blocks."""
        return f"select {self._selected} from only {self.name.sql} where {blocks.condition}"

    @property
    def whole_query(self) -> str:
        """Give the query for all rows of a chunk, compressed ones included."""
        return f"select {self._selected} from {self.name.sql}"

    @property
    def _selected(self) -> str:
        return ", ".join(quote_identifier(column) for column in self.columns)


async def stream_copy(
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    plan: CopyPlan,
    *,
    blocks: BlockRange | None,
    freeze: bool,
    on_bytes: Callable[[int], None],
) -> CopyCount:
    """Copy a table's own rows, or those in `blocks`, inside the transactions that both sessions are in.

    `on_bytes` is told the bytes so far. After an error both sessions are in no state to be used.

    Raises:
        TableStopped | CopyDeferred | ConnectionLost: either server's error; nothing may be committed then.
    """
    pipe = BytePipe(PIPE_BYTES)

    async def write(chunk: bytes | bytearray) -> None:
        await pipe.write(chunk)
        on_bytes(pipe.total_bytes)

    try:
        async with TaskGroup() as group:
            reading = group.create_task(_copy_out(source, plan, blocks, write, pipe))
            writing = group.create_task(_copy_in(target, plan, freeze, pipe))
    except BaseExceptionGroup as errors:
        raise leading_error(errors) from None
    sent, taken = reading.result(), writing.result()
    if sent != taken:
        raise TableStopped(f"copying {plan.name}: the source sent {sent} rows, the target took {taken}")
    return CopyCount(taken, pipe.total_bytes)


async def _copy_out(
    source: asyncpg.Connection,
    plan: CopyPlan,
    blocks: BlockRange | None,
    write: Callable[[bytes | bytearray], object],
    pipe: BytePipe,
) -> int:
    with server_errors("source", f"copying {plan.name}"):
        if plan.decompresses:
            status = await source.copy_from_query(plan.whole_query, output=write, format=plan.format)
        elif blocks is None:  # COPY of a table's name is faster than of a query, and leaves children out
            status = await source.copy_from_table(
                plan.name.name,
                schema_name=plan.name.schema,
                columns=plan.columns or None,
                output=write,
                format=plan.format,
            )
        else:
            status = await source.copy_from_query(plan.query(blocks), output=write, format=plan.format)
    pipe.close()
    return _row_count(status)


async def _copy_in(target: asyncpg.Connection, plan: CopyPlan, freeze: bool, pipe: BytePipe) -> int:
    into = plan.target or plan.name
    with server_errors("target", f"copying {plan.name}"):
        status = await target.copy_to_table(
            into.name,
            schema_name=into.schema,
            columns=plan.columns or None,
            source=while_connected(target, pipe.read()),
            format=plan.format,
            freeze=freeze or None,
        )
    return _row_count(status)


def _row_count(status: str) -> int:
    return int(status.removeprefix("COPY "))
