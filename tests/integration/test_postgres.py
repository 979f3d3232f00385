"""Our sessions on a real server."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.postgres import session

pytestmark = pytest.mark.integration


async def test_no_timeout_of_the_database_ends_a_session_of_ours(target_database: str) -> None:
    """A lane's transaction may last for as long as a source transaction is big, and its session be idle for hours."""
    owner = await asyncpg.connect(target_database)
    database = await owner.fetchval("select quote_ident(current_database())")
    timeouts = (
        "transaction_timeout",
        "idle_session_timeout",
        "idle_in_transaction_session_timeout",
        "statement_timeout",
    )
    for timeout in timeouts:
        await owner.execute(f"alter database {database} set {timeout} = '100ms'")
    await owner.close()
    async with session(target_database, "target") as connection:
        await connection.execute("begin")
        await connection.execute("select pg_sleep(0.3)")
        await connection.execute("commit")
        assert {await connection.fetchval("select current_setting($1)", timeout) for timeout in timeouts} == {"0"}
