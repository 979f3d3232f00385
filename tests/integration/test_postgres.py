"""Our sessions on a real server."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.errors import ConnectionLost, SourceError
from live_migration.common.postgres import asking, session

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


async def test_a_target_in_recovery_or_read_only_is_one_to_come_back_to(target_database: str) -> None:
    """A target that fails over is a standby for a moment: workers wait for it, as for one that is away."""
    owner = await asyncpg.connect(target_database)
    database = await owner.fetchval("select quote_ident(current_database())")
    await owner.execute(f"alter database {database} set default_transaction_read_only = on")
    async with session(target_database, "target") as connection:
        with pytest.raises(ConnectionLost, match="read-only transaction"), asking("target", "writing"):
            await connection.execute("create table refused (id int)")
        with pytest.raises(SourceError), asking("source", "writing"):  # there it is what the user has to mend
            await connection.execute("create table refused (id int)")
    await owner.execute(f"alter database {database} reset default_transaction_read_only")
    await owner.close()
