"""How the transactions of a copy begin on the target and end on the source."""

from __future__ import annotations

from live_migration.consumer.copy_errors import server_errors
from live_migration.consumer.sessions import CopySession

_LOCK_TIMEOUT_SECONDS = 30.0
"""For emptying a table on the target: whoever uses it there must not keep our lock on the source for ever."""


async def begin_on_target(
    target: CopySession, what: str, *statements: str, lock_timeout: float = _LOCK_TIMEOUT_SECONDS
) -> None:
    """Begin the transaction for the rows; `statements` are run in it, before anything that COPY FREEZE would mind."""
    with server_errors("target", f"beginning to copy {what}"):
        await target.connection.execute(
            "; ".join(
                [
                    "begin",
                    "set local synchronous_commit = off",
                    f"set local lock_timeout = '{round(lock_timeout * 1000)}ms'",
                    *target.copy_settings,
                    *statements,
                ]
            )
        )


async def end_on_source(source: CopySession, what: str) -> None:
    """Let go of lock and snapshot as soon as the last row is read."""
    with server_errors("source", f"ending the copy of {what}"):
        await source.connection.execute("rollback")
