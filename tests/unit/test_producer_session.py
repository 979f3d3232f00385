"""A producer's session without servers."""

from __future__ import annotations

from typing import Any, cast

from psycopg import OperationalError

from live_migration.common.control import ProducerConfig
from live_migration.common.errors import ConnectionLost
from live_migration.common.settings import Settings
from live_migration.producer.session import Session
from live_migration.producer.status import StatusReport


class NoPublisher:
    position = None


async def test_an_error_of_libpq_ends_the_session_as_a_lost_connection() -> None:
    """Such as it raises when another task found the connection broken first: not a bug that ends the process."""
    config = ProducerConfig(
        migration_id="m",
        topic_id="11111111-2222-3333-4444-555555555555",
        slot="s",
        publications=("p",),
        binary=False,
        lane_count=1,
        system_identifier="1",
        timeline=1,
        start_lsn=1,
    )
    settings = Settings.model_validate({"source": "postgresql://nobody@localhost/nothing"})
    session = Session(settings, config, cast(Any, NoPublisher()), cast(Any, None), 1, StatusReport())

    async def broken() -> None:
        raise OperationalError("the connection is lost")

    await session._until_broken(broken())
    assert isinstance(session._failure, ConnectionLost)
    assert session._ending.is_set()
