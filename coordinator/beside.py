"""Work with watchers beside it, and what became of both."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence

import asyncpg
from aiokafka import errors as kafka_errors

from live_migration.common import kafka
from live_migration.common.errors import ConnectionLost, Fenced, LiveMigrationError, Retry
from live_migration.common.postgres import CONNECTION_ERRORS, is_of_a_closed_transport, server_error
from live_migration.common.tasks import TaskGroup


async def beside(work: Coroutine[None, None, None], watchers: Sequence[Coroutine[None, None, None]]) -> None:
    """Run work with watchers beside it, which never return by themselves; all end when one fails or the work is done."""
    try:
        async with TaskGroup() as group:
            tasks = [group.create_task(watcher) for watcher in watchers]
            await work
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as failures:
        raise most_telling(failures) from failures


def most_telling(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Give the failure that explains the others: being fenced, then our own errors, lost connections last."""
    leaves: list[BaseException] = []
    for failure in failures.exceptions:
        leaves.append(most_telling(failure) if isinstance(failure, BaseExceptionGroup) else failure)

    def rank(failure: BaseException) -> int:
        if isinstance(failure, Fenced):
            return 0
        if isinstance(failure, Exception):
            return 2 if translated(failure).retry is Retry.RECONNECT else 1
        return 0

    return min(leaves, key=rank)


def translated(error: Exception) -> LiveMigrationError:
    """Give our error for any error that a phase may end with; a fault of this program passes as it is, by raising it."""
    if isinstance(error, LiveMigrationError):
        return error
    if isinstance(error, kafka_errors.KafkaError):
        return kafka.translate(error, "leading the migration")
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | FileExistsError):
        return LiveMigrationError(f"{error.strerror}: {error.filename}", hint="Look at --dir and --pg-bin.")
    if isinstance(error, CONNECTION_ERRORS) or (isinstance(error, RuntimeError) and is_of_a_closed_transport(error)):
        return ConnectionLost(f"a connection broke: {error or type(error).__name__}")
    if isinstance(error, asyncpg.PostgresError):
        return server_error(error, "target", "leading the migration")
    if isinstance(error, asyncpg.InterfaceError) and "connection" in str(error):
        return ConnectionLost(f"a connection broke: {error}")
    raise error
