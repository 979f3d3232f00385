"""The proxy that breaks connections in chaos rounds: each of its faults against an echo server, and a commit's lost answer for real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from tests.support.proxy import Proxy, is_commit, is_source_commit

pytestmark = pytest.mark.integration


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1024):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        async with Proxy(lambda: port) as proxy:
            yield proxy


class _Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, data: bytes) -> bytes:
        self.writer.write(data)
        async with asyncio.timeout(20):
            return await self.reader.readexactly(len(data))

    async def is_cut(self) -> bool:
        async with asyncio.timeout(20):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


async def connect(proxy: Proxy) -> _Client:
    return _Client(*await asyncio.open_connection("127.0.0.1", proxy.port))


async def test_it_counts_what_a_server_refuses(proxy: Proxy) -> None:
    client = await connect(proxy)
    refused = b"E\0\0\0\x20SFATAL\0VFATAL\0C53300\0Msorry\0\0"
    await client.ask(refused)
    with proxy.counting_errors("53300") as found, proxy.counting_errors("53100") as others:
        await client.ask(b"D\0\0\0\x20 53300 rows")
        await client.ask(refused)
    await client.ask(refused)
    assert (found.total(), others.total()) == (1, 0)


async def test_it_forwards_until_it_is_told_to_cut(proxy: Proxy) -> None:
    first, second = await connect(proxy), await connect(proxy)
    assert await first.ask(b"one") == b"one"
    assert await second.ask(b"x" * 100_000) == b"x" * 100_000
    proxy.cut()
    assert await first.is_cut()
    assert await second.is_cut()
    assert await (await connect(proxy)).ask(b"again") == b"again"


async def test_it_cuts_in_the_midst_of_a_message(proxy: Proxy) -> None:
    client = await connect(proxy)
    proxy.cut_after(10)
    client.writer.write(b"0123456")
    assert await client.reader.readexactly(3) == b"012"
    assert await client.is_cut()
    assert not proxy.is_pending


async def test_while_it_stalls_nothing_comes_and_nothing_is_lost(proxy: Proxy) -> None:
    client = await connect(proxy)
    await client.ask(b"warm")
    proxy.stall("down")
    client.writer.write(b"held")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await client.reader.read(1)
    proxy.heal()
    assert await client.reader.readexactly(4) == b"held"
    proxy.stall("up")
    client.writer.write(b"never")
    proxy.cut()
    assert await client.is_cut()


async def test_slow_is_slow(proxy: Proxy) -> None:
    client = await connect(proxy)
    proxy.slow_down(20_000)
    began = asyncio.get_running_loop().time()
    await client.ask(b"x" * 10_000)
    assert asyncio.get_running_loop().time() - began > 0.4


async def test_refused_and_then_on_the_same_port_again(proxy: Proxy) -> None:
    client = await connect(proxy)
    await proxy.stop()
    assert await client.is_cut()
    with pytest.raises(ConnectionError):
        await connect(proxy)
    await proxy.start()
    assert await (await connect(proxy)).ask(b"back") == b"back"


async def test_a_commit_whose_answer_is_lost_has_happened(source_database: str) -> None:
    parts = urlsplit(source_database)
    async with Proxy(lambda: parts.port or 0) as proxy:
        behind = urlunsplit(parts._replace(netloc=f"postgres@127.0.0.1:{proxy.port}"))
        connection = await asyncpg.connect(behind)
        await connection.execute("create table committed (id int)")
        proxy.lose_answer(is_commit)
        with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
            async with connection.transaction():
                await connection.execute("insert into committed values (1)")
        connection = await asyncpg.connect(behind)
        assert await connection.fetchval("select count(*) from committed") == 1
        assert proxy.losses == 1
        await connection.close()


async def test_a_commit_that_wrote_nothing_is_not_the_one(source_database: str) -> None:
    parts = urlsplit(source_database)
    async with Proxy(lambda: parts.port or 0) as proxy:
        connection = await asyncpg.connect(urlunsplit(parts._replace(netloc=f"postgres@127.0.0.1:{proxy.port}")))
        proxy.lose_answer(is_commit)
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.fetchval("select 1")
        assert proxy.is_pending
        with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
            async with connection.transaction():
                await connection.execute("create table committed (id int)")
        assert proxy.losses == 1


async def test_a_publication_that_is_made_commits_by_itself(source_database: str) -> None:
    parts = urlsplit(source_database)
    async with Proxy(lambda: parts.port or 0) as proxy:
        behind = urlunsplit(parts._replace(netloc=f"postgres@127.0.0.1:{proxy.port}"))
        connection = await asyncpg.connect(behind)
        proxy.lose_answer(is_source_commit)
        with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
            await connection.execute("create publication made with (publish = 'insert')")
        connection = await asyncpg.connect(behind)
        assert await connection.fetchval("select count(*) from pg_publication where pubname = 'made'") == 1
        await connection.close()
