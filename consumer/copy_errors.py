"""What keeps a table from being copied now, and servers' errors turned into that.

    CopyDeferred     something passing: tried again soon
    └── AttemptOver  nobody can go on with a table's shared snapshot: the table begins anew
    CopyEnded        the phase is over, or the consumer is told to stop
    TableStopped     the table stays behind with error and hint until somebody mends it; it is looked at again by and by

A connection that broke is `ConnectionLost`, a claim that somebody else took over `Fenced`; what else is raised ends the consumer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from live_migration.common.errors import ConnectionLost, LiveMigrationError, Retry
from live_migration.common.postgres import CONNECTION_ERRORS, Side, is_of_a_closed_transport, server_error
from live_migration.common.tasks import is_cancelled


class CopyDeferred(LiveMigrationError):
    """The copy gives way for a moment. `is_news`: worth a line in the migration's events."""

    retry = Retry.RECONNECT

    def __init__(self, message: str, *, hint: str = "", is_news: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.is_news = is_news


class AttemptOver(CopyDeferred):
    """Lock and snapshot of a table are lost or given up: its parts, done or not, count no more."""


class CopyEnded(LiveMigrationError):
    """The copy is not wanted any more."""

    retry = Retry.RECONNECT


class TableStopped(LiveMigrationError):
    """A table cannot be copied as things are. `retry_seconds`: when it is looked at again."""

    retry = Retry.RECONNECT

    def __init__(self, message: str, *, hint: str = "", retry_seconds: float = 3.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_seconds = retry_seconds


REFUSED_RETRY_SECONDS = 10.0
"""When a statement that a server refused is tried again."""

_PASSING = (
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)


@contextmanager
def server_errors(side: Side, doing: str) -> Iterator[None]:
    """Turn a server's errors into this module's; `doing` says what was tried, with the relation's name."""
    try:
        yield
    except LiveMigrationError:
        raise
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        raise ConnectionLost(
            f"{side}: {doing}: the connection broke"
        ) from None  # the driver's own, nobody cancelled us
    except _PASSING as error:
        raise CopyDeferred(server_error(error, side, doing).message) from error
    except (*CONNECTION_ERRORS, asyncpg.InterfaceError) as error:
        raise ConnectionLost(f"{side}: {doing}: the connection broke: {str(error) or type(error).__name__}") from error
    except RuntimeError as error:
        if not is_of_a_closed_transport(error):
            raise
        raise ConnectionLost(f"{side}: {doing}: the connection broke: {error}") from error
    except asyncpg.PostgresError as error:
        ours = server_error(error, side, doing)
        if isinstance(ours, ConnectionLost):
            raise ours from error
        hint = ours.hint or f"Mend it on the {side}; it is tried again by itself."
        raise TableStopped(ours.message, hint=hint, retry_seconds=REFUSED_RETRY_SECONDS) from error


def leading_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Give the one of several errors that tells most: a server's refusal rather than the broken connection that follows it."""
    leaves = _leaves(group)
    for kind in (TableStopped, CopyDeferred, CopyEnded, LiveMigrationError):
        for error in leaves:
            if isinstance(error, kind) and not isinstance(error, ConnectionLost):
                return error
    return leaves[0]


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
