"""What a session is like between its transactions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

_SETTINGS = "select name, setting from pg_settings order by name"


@asynccontextmanager
async def keeping_settings(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """Require that no setting of the session outlives the transactions inside: behind a pooler the next one may be somebody else's."""
    before = dict(await connection.fetch(_SETTINGS))
    yield
    after = dict(await connection.fetch(_SETTINGS))  # with those of modules that the server has loaded meanwhile
    changed = {name: after[name] for name, setting in before.items() if after[name] != setting}
    assert not changed, f"settings outlived their transaction: {changed}"
