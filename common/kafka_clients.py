"""Kafka's clients as we use them: their options, and an end that comes and never swallows a cancellation."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from live_migration.common.settings import Settings
from live_migration.common.tasks import kept_cancellation
from live_migration.common.telemetry import get_logger

_CANCEL_AGAIN_SECONDS = 1.0
_GIVE_UP_SECONDS = 10.0

log = get_logger(__name__)


async def until_stopped(stopping: Coroutine[Any, Any, None], inner: Callable[[], list[asyncio.Task[Any]]]) -> bool:
    """Wait for a client's end, cancelling its tasks again while it does not come; tell whether it came as it should.

    aiokafka cancels each of its tasks once and waits for it; one that loses that cancellation (it waits for another that it has
    cancelled, just then) goes on for ever, and so did the wait: seen in a lane whose broker and target went away together.
    For some it does not expect CancelledError, and passes it on. Nobody has cancelled us then: a lane's task that took it
    for its own ended without a word (seen as above, seeds 70025 and 80019).
    """
    task = asyncio.ensure_future(stopping)
    try:
        for _ in range(round(_GIVE_UP_SECONDS / _CANCEL_AGAIN_SECONDS)):
            done, _ = await asyncio.wait([task], timeout=_CANCEL_AGAIN_SECONDS)
            if done:
                if task.cancelled():
                    return False
                task.result()
                return True
            for each in inner():
                each.cancel()
    finally:
        if not task.done():
            task.cancel()
    log.warning("a Kafka client did not end, and is left behind", seconds=_GIVE_UP_SECONDS)
    return False


def inner_tasks(client: object) -> list[asyncio.Task[Any]]:
    """Give the tasks of an aiokafka client that are not done."""
    return [task for task in _find_tasks(client, 3) if not task.done()]


def _find_tasks(holder: object, depth: int) -> Iterator[asyncio.Task[Any]]:
    for value in list(getattr(holder, "__dict__", {}).values()):
        for each in value if isinstance(value, set | list) else (value,):
            if isinstance(each, asyncio.Task):
                yield each
            elif depth and type(each).__module__.startswith("aiokafka"):
                yield from _find_tasks(each, depth - 1)


class LogConsumer(AIOKafkaConsumer):  # type: ignore[misc]  # aiokafka has no types
    """aiokafka's consumer. Its own `stop` suppresses CancelledError while it awaits what it has cancelled itself, or raises it."""

    async def stop(self) -> None:
        with kept_cancellation():
            if not await until_stopped(super().stop(), lambda: inner_tasks(self)):
                for each in inner_tasks(self):
                    each.cancel()
                await until_stopped(self._client.close(), lambda: inner_tasks(self._client))


class LogProducer(AIOKafkaProducer):  # type: ignore[misc]
    """aiokafka's producer, with the same remedy."""

    async def stop(self) -> None:
        with kept_cancellation():
            await super().stop()


class AdminClient(AIOKafkaAdminClient):  # type: ignore[misc]
    """aiokafka's admin client, with the same remedy."""

    async def close(self) -> None:
        with kept_cancellation():
            await until_stopped(super().close(), lambda: inner_tasks(self))


def client_options(settings: Settings) -> dict[str, Any]:
    """Give the connection options that every aiokafka client takes."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_servers(),
        "security_protocol": settings.kafka_security_protocol,
        "request_timeout_ms": 30_000,
        "retry_backoff_ms": 100,
    }
    if "SSL" in settings.kafka_security_protocol:
        options["ssl_context"] = ssl.create_default_context(
            cafile=str(settings.kafka_ca_file) if settings.kafka_ca_file else None
        )
    if "SASL" in settings.kafka_security_protocol:
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_username
        options["sasl_plain_password"] = settings.kafka_password.get_secret_value() if settings.kafka_password else None
    return options


def log_consumer(settings: Settings, *, group_id: str | None = None, **options: Any) -> LogConsumer:
    """Give a client that reads our topics as they must be read: what is committed only, and never on from a guessed offset."""
    return LogConsumer(
        **client_options(settings),
        group_id=group_id,
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="none",
        **options,
    )
