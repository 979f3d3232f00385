"""What a producer holds, over connections that break."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import pytest

from live_migration.common.postgres import session
from live_migration.common.settings import Settings
from live_migration.producer.session import Session
from live_migration.producer.wire import ReceiveBuffer
from tests.fixtures.change_log import (
    active_walsender,
    prepare,
    run_sql,
    running_producer,
    source_lsn,
    wait_for,
    wait_until_published,
)
from tests.integration.test_producer import NAMES, TABLES, make_settings
from tests.support.proxy import Proxy

pytestmark = pytest.mark.integration

_BREAKS = 3


@pytest.fixture
async def proxy(source_database: str) -> AsyncIterator[Proxy]:
    async with Proxy(lambda: urlsplit(source_database).port or 0) as proxy:
        yield proxy


@pytest.fixture
async def settings(source_database: str, kafka_bootstrap: str, unique_name: str) -> Settings:
    given = make_settings(source_database, kafka_bootstrap, unique_name)
    await run_sql(given, TABLES)
    return given


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what nothing refers to any more is freed: cycles stay, as they do for an hour where little is allocated."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("by", ["proxy", "server"])
async def test_broken_sessions_do_not_pile_up(settings: Settings, proxy: Proxy, by: str) -> None:
    """Each left its receive buffer and unsent changes in a cycle through its error: 1 MiB and more for each cut (seen in a soak).

    Beside the session that runs, the last one that broke may still be held, until the next break.
    """
    await prepare(settings, NAMES)
    source = settings.source_uri()
    async with running_producer(make_settings(proxy.uri(source), settings.kafka_servers(), settings.name)):
        async with session(source, "source") as connection:

            async def is_streaming_anew(before: int | None) -> bool:
                return await active_walsender(connection, settings.slot) not in (None, before)

            pid = None
            for number in range(_BREAKS + 1):
                await connection.execute("insert into public.orders values ($1, 'one')", number)
                await wait_until_published(settings, await source_lsn(settings))
                pid = await active_walsender(connection, settings.slot)
                if number == _BREAKS:
                    break
                if by == "proxy":
                    proxy.cut()
                else:
                    await connection.execute("select pg_terminate_backend($1)", pid)
                await wait_for(lambda before=pid: is_streaming_anew(before))
            assert max(_count(kind) for kind in (Session, ReceiveBuffer)) <= 2


def _count(kind: type) -> int:
    return sum(type(each) is kind for each in gc.get_objects())
