"""The replication connection on a real server."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import struct
from contextlib import suppress

import asyncpg
import pytest
import uvloop

from live_migration.common.errors import ConnectionLost
from live_migration.common.settings import MIB
from live_migration.producer.pace import LONG_SECONDS
from live_migration.producer.replication import COUNTS_ALL_MEMORY, ReplicationConnection
from live_migration.producer.wire import ReceiveBuffer

pytestmark = pytest.mark.integration


def test_one_that_broke_between_two_commands_is_a_lost_connection(source_database: str) -> None:
    """On the loop that the producer runs on, whose transports take no write once they are closed."""

    async def work() -> None:
        async with await ReplicationConnection.open(source_database) as stream:
            await stream.query("IDENTIFY_SYSTEM")
            administrator = await asyncpg.connect(source_database)
            ended = """select pg_terminate_backend(pid, 5000) from pg_stat_activity
                       where datname = current_database() and backend_type = 'walsender'"""
            assert await administrator.fetchval(ended)
            await administrator.close()
            async with asyncio.timeout(20):
                while not stream._input.is_lost:
                    await stream.received()
            await asyncio.sleep(0)  # a turn later the transport is closed for good
            with pytest.raises(ConnectionLost):
                await stream.query("IDENTIFY_SYSTEM")
            with pytest.raises(ConnectionLost):
                await stream.start("any", 0, {})

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())


ROWS = (
    (10, 20_000),
    (1_000, 3_000),
    (10_000, 300),
    (60_000, 60),
    (100_000, 60),
    (1_000_000, 6),
    (50_000_000, 1),
    (10, 1_000),
)
"""Bytes and number of rows of each transaction."""


class Rows:
    """What a stream of inserts brings: a digest of each row by its key, and how often the stream was read."""

    def __init__(self) -> None:
        self.found: dict[int, str] = {}
        self.gulps = 0
        self.standing_still = 0

    async def read(self, stream: ReplicationConnection, count: int) -> None:
        """Read in gulps, with the longest pause after each, as in a backlog that never ends."""
        ends = server_end(stream._connection._transport)
        while len(self.found) < count:
            await stream.received()
            self.gulps += 1
            if not await stream.gulp():
                self.standing_still += waits_for_persist_timer(ends)
            while stream.take(self._consume, 256 * 1024):
                pass
            await stream.gather(LONG_SECONDS)

    def _consume(self, data: bytes | memoryview) -> int:
        inserts, taken = whole_inserts(data)
        for message in inserts:
            self._see(message)
        return taken

    def _see(self, message: bytes) -> None:
        at, values = 33, []  # behind XLogData's head, type, oid, 'N' and the number of columns
        for _ in range(2):
            (size,) = struct.unpack_from(">I", message, at + 1)
            values.append(message[at + 5 : at + 5 + size])
            at += 5 + size
        assert int(values[0]) not in self.found
        self.found[int(values[0])] = hashlib.md5(values[1]).hexdigest()


def whole_inserts(data: bytes | memoryview) -> tuple[list[bytes], int]:
    """Give what the whole CopyData messages that `data` begins with hold of inserts, and how many bytes they all are."""
    at, inserts = 0, []
    while at + 5 <= len(data):
        _, length = struct.unpack_from(">BI", data, at)
        if data[at] != ord("d") or at + 1 + length > len(data):
            break
        message = bytes(data[at + 5 : at + 1 + length])
        if message[:1] == b"w" and message[25:26] == b"I":
            inserts.append(message)
        at += 1 + length
    return inserts, at


def server_end(transport: asyncio.BaseTransport) -> str:
    """Give the other end of a connection on 127.0.0.1 as /proc/net/tcp writes it."""
    connection = transport.get_extra_info("socket")
    return " ".join(f"0100007F:{port:04X}" for _, port in (connection.getpeername(), connection.getsockname()))


def waits_for_persist_timer(ends: str) -> bool:
    """Tell whether a sender has something to send, nothing under way, and a window too small for it, though all was read that there was."""
    with open("/proc/net/tcp") as connections:
        (line,) = [each for each in connections if ends in each]
    timer = line.split()[5].partition(":")[0]
    return timer == "04"


async def test_rows_of_every_size_come_in_gulps(source_database: str) -> None:
    """No window is smaller than a packet: whatever the rows are, reading makes the walsender go on, and not its persist timer."""
    connection = await asyncpg.connect(source_database)
    await connection.execute("create table public.rows (id bigserial primary key, v text)")
    await connection.execute("alter table public.rows alter v set storage external")
    await connection.execute("create publication every_size for table public.rows")
    slot = f"every_size_{source_database.rpartition('_')[2]}"
    await connection.fetch("select pg_create_logical_replication_slot($1, 'pgoutput')", slot)
    for size, count in ROWS:
        await connection.execute(
            """insert into public.rows (v) select left(repeat(md5(i::text), $1 / 32 + 1), $1)
               from generate_series(1, $2) i""",
            size,
            count,
        )
    wanted = {row["id"]: row["digest"] for row in await connection.fetch("select id, md5(v) digest from public.rows")}
    await connection.close()
    rows = Rows()
    async with await ReplicationConnection.open(source_database) as stream:
        assert stream.is_local
        await stream.start(slot, 0, {"proto_version": "1", "publication_names": "every_size"})
        async with asyncio.timeout(300):
            await rows.read(stream, len(wanted))
    assert rows.found == wanted
    print(f"{stream.received_bytes} bytes, {rows.gulps} gulps, the walsender stood still after {rows.standing_still}")
    assert rows.standing_still <= rows.gulps / 10


def send_each(sender: socket.socket, piece: bytes) -> None:
    for _ in range(100):
        sender.sendall(piece)


async def test_a_window_smaller_than_a_packet_is_noticed() -> None:
    """What the test above looks for is there to be seen."""
    piece = struct.pack(">BI", ord("d"), 10_000) + bytes(9_996)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        connection, _ = server.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=connection)
        buffer = ReceiveBuffer(transport)
        transport.set_protocol(buffer)
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as PostgreSQL's
        sending = asyncio.create_task(asyncio.to_thread(send_each, sender, piece))
        ends, standing_still = server_end(transport), 0
        while buffer.received_bytes < 100 * len(piece) and not standing_still:
            await buffer.received()
            if not await buffer.gulp():
                standing_still += waits_for_persist_timer(ends)
            while buffer.take_copy_data(lambda data: len(data) // len(piece) * len(piece), 1 << 18):
                pass
            await buffer.gather(LONG_SECONDS)
        assert standing_still
        transport.abort()
        with suppress(ConnectionError):
            await sending


LARGE = 150_000
"""Rows of a transaction that takes 64 MB and not 256 in a walsender."""


@pytest.mark.parametrize(("byte_count", "is_spilled"), [(256 * MIB, False), (0, True)])
async def test_a_large_transaction_is_held_in_the_walsenders_memory(
    source_database: str, byte_count: int, is_spilled: bool
) -> None:
    connection = await asyncpg.connect(source_database)
    await connection.execute("create table public.large (id bigint primary key, v text)")
    await connection.execute("create publication large for table public.large")
    slot = f"large_{source_database.rpartition('_')[2]}"
    await connection.fetch("select pg_create_logical_replication_slot($1, 'pgoutput')", slot)
    await connection.execute(
        "insert into public.large select i, repeat('x', 400) from generate_series(1, $1::int) i", LARGE
    )
    seen = 0

    def consume(data: bytes | memoryview) -> int:
        nonlocal seen
        inserts, taken = whole_inserts(data)
        seen += len(inserts)
        return taken

    async with await ReplicationConnection.open(source_database) as stream:
        await stream.allow_memory(byte_count)
        await stream.start(slot, 0, {"proto_version": "1", "publication_names": "large"})
        async with asyncio.timeout(120):
            while seen < LARGE:
                await stream.received()
                stream.take(consume, 1 << 20)
    query = "select spill_txns > 0 from pg_stat_replication_slots where slot_name = $1 and total_txns > 0"
    async with asyncio.timeout(30):
        while (spilled := await connection.fetchval(query, slot)) is None:
            await asyncio.sleep(0.1)  # the server writes its statistics when the walsender has ended
    assert spilled is is_spilled
    await connection.close()


async def test_a_server_that_allows_more_is_left_alone(source_database: str) -> None:
    connection = await asyncpg.connect(source_database)
    name = source_database.rpartition("/")[2]
    await connection.execute(f"alter database {name} set logical_decoding_work_mem = '1GB'")
    await connection.close()
    async with await ReplicationConnection.open(source_database) as stream:
        await stream.allow_memory(256 * MIB)
        assert await stream.query("show logical_decoding_work_mem") == [(b"1GB",)]
        await stream.allow_memory(2048 * MIB)
        assert await stream.query("show logical_decoding_work_mem") == [(b"2GB",)]


async def test_a_server_that_refuses_is_read_all_the_same(
    source_database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with await ReplicationConnection.open(source_database) as stream:
        await stream.allow_memory(2**60)
        assert await stream.query("show logical_decoding_work_mem") == [(b"64MB",)]
    said = capsys.readouterr()  # where the log goes is what a test before may have set
    assert "keeps the server's logical_decoding_work_mem" in said.out + said.err


async def test_minor_versions_that_hold_more_than_they_count_are_left_alone(source_database: str) -> None:
    connection = await asyncpg.connect(source_database)
    numbers = (130016, 130017, 140013, 140014, 150008, 150009, 160004, 160005, 170000, 170001, 180000)
    query = f"select array_agg(number) from unnest($1::int[]) number where {COUNTS_ALL_MEMORY}"
    assert await connection.fetchval(query, numbers) == [130017, 140014, 150009, 160005, 170001, 180000]
    await connection.close()
