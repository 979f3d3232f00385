"""Rows of a hypertable that are not changed where they stand: deleted, and inserted as they are to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import asyncpg

from live_migration.consumer import hypertable_statements, statements
from live_migration.consumer.hypertables import HypertableInfo
from live_migration.consumer.refusal import BatchRefused
from live_migration.consumer.stretches import stretches
from live_migration.consumer.target_tables import TargetTable


class HypertableRows:
    """Takes rows of one hypertable out and puts them back, inside the session's transaction.

    `taken`: an empty temporary table of `hypertable_statements.taken_columns`.
    """

    def __init__(self, connection: asyncpg.Connection, table: TargetTable, info: HypertableInfo, taken: str) -> None:
        self._connection = connection
        self._table = table
        self._info = info
        self._taken = taken

    async def move(self, stage: str, staged: Mapping[str, str], present: Sequence[int]) -> int:
        """Update the rows whose keys are staged, and give how many there were. `staged`: the key's columns -> those of the stage."""
        hit = 0
        for within in await stretches(self._connection, self._table, stage, staged):
            keep = hypertable_statements.keep_updated(self._table, self._info, stage, self._taken, present, within)
            await self._connection.execute(keep)
            hit += await execute(self._connection, statements.delete_staged(self._table, stage, within))
        await self._put_back(hit)
        return hit

    async def delete_equal(self, stage: str) -> int:
        """Delete as many of equal rows as are staged, and give how many there were.

        All of them are deleted, and the surplus put back: nothing tells them apart.
        """
        table = self._table
        staged = {column.name: f"c{i}" for i, column in enumerate(table.columns)}
        deleted = kept = 0
        # a nested loop would compare each row's image with those of all staged rows of its time
        await self._connection.execute("set local enable_nestloop = off")
        for within in await stretches(self._connection, table, stage, staged):
            keep = hypertable_statements.keep_surplus(table, self._info, stage, self._taken, within)
            kept += await execute(self._connection, keep)
            delete = hypertable_statements.delete_equal_rows(table, self._info, stage, within)
            deleted += await execute(self._connection, delete)
        await self._connection.execute("set local enable_nestloop to default")
        await self._put_back(kept)
        return deleted - kept

    async def _put_back(self, expected: int) -> None:
        if not expected:
            return
        put = await execute(self._connection, hypertable_statements.put_back(self._table, self._info, self._taken))
        if put != expected:
            reason = f"INSERT took {put} of {expected} rows that had been taken out to be changed"
            raise BatchRefused(f"{self._table.name}: {reason}", reason=reason)


async def execute(connection: asyncpg.Connection, statement: str) -> int:
    """Execute a statement and give how many rows it hit."""
    return row_count(await connection.execute(statement))


def row_count(status: str) -> int:
    """Give the number of rows in what the server says of a statement."""
    return int(status.rpartition(" ")[2])
