"""Kafka's clients as we use them: their options, and an end that never swallows a cancellation."""

from __future__ import annotations

import ssl
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from live_migration.common.settings import Settings
from live_migration.common.tasks import kept_cancellation


class LogConsumer(AIOKafkaConsumer):  # type: ignore[misc]  # aiokafka has no types
    """aiokafka's consumer. Its own `stop` suppresses CancelledError while it awaits what it has cancelled itself."""

    async def stop(self) -> None:
        with kept_cancellation():
            await super().stop()


class LogProducer(AIOKafkaProducer):  # type: ignore[misc]
    """aiokafka's producer, with the same remedy."""

    async def stop(self) -> None:
        with kept_cancellation():
            await super().stop()


class AdminClient(AIOKafkaAdminClient):  # type: ignore[misc]
    """aiokafka's admin client, with the same remedy."""

    async def close(self) -> None:
        with kept_cancellation():
            await super().close()


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
