"""A PostgreSQL server in a container, as far as tests need one: it is started, asked for URIs, and stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import chain
from urllib.parse import quote

from testcontainers.community.postgres import PostgresContainer
from testcontainers.core.config import testcontainers_config

_PORT = 5432


class ContainerPostgres:
    """A server of an image, with the superuser `postgres`; on a port of the loopback that the engine chooses. Everybody is let in."""

    def __init__(self, image: str, settings: Mapping[str, str]) -> None:
        """Describe the server; nothing is started.

        Args:
            image: one that takes what `postgres` on Docker takes, and is here already.
            settings: as in postgresql.conf, unquoted.
        """
        options = chain.from_iterable(("-c", f"{name}={value}") for name, value in settings.items())
        container = PostgresContainer(image, port=_PORT, username="postgres", dbname="postgres", driver=None)
        container.ports[str(_PORT)] = ("127.0.0.1", None)  # type: ignore[assignment]  # as the engine's client takes it
        container.with_env("POSTGRES_HOST_AUTH_METHOD", "trust").with_kwargs(shm_size="1g")
        self._container = container.with_command(["postgres", *options])
        self._port = 0

    async def start(self) -> None:
        """Start the server and return when it takes connections."""
        testcontainers_config.ryuk_disabled = True  # an image of its own, for no more than what `stop` does
        try:
            await asyncio.to_thread(self._container.start)
        except BaseException:
            await self.stop()
            raise
        self._port = self._container.get_exposed_port(_PORT)

    async def stop(self) -> None:
        """Stop the server and throw it away."""
        await asyncio.to_thread(self._container.stop)

    def uri(self, database: str = "postgres") -> str:
        """Give the superuser's URI for a database."""
        return f"postgresql://postgres@127.0.0.1:{self._port}/{quote(database, safe='')}"
