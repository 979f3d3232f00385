"""Batches to the target: each in the transaction that the caller began, which also takes the checkpoint.

Three ways, the fastest that is right: runs of inserts go by COPY; mixed runs are folded by key, staged by COPY and
applied by one DELETE, UPDATE and COPY each; what cannot be folded is staged with its order and applied change by change.
Rows hit must equal rows staged, each time: a plain insert never upserts, an update without its row is an alarm.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from typing import NoReturn
from zlib import crc32

import asyncpg

from live_migration.common import pgoutput
from live_migration.common.errors import FormatError
from live_migration.common.postgres import CONNECTION_ERRORS, replica_role, while_connected
from live_migration.common.relation import QualifiedName
from live_migration.consumer import hypertable_statements, statements
from live_migration.consumer.decoder import Batch, TableRun, TruncateStep, all_runs
from live_migration.consumer.folding import NetEffect, NotFoldable, decode_change, fold_whole_rows
from live_migration.consumer.hypertable_rows import HypertableRows, execute, row_count
from live_migration.consumer.hypertables import HypertableInfo, session_settings
from live_migration.consumer.net_changes import PlainDeletes, take_net_changes
from live_migration.consumer.plain_changes import PlainChanges
from live_migration.consumer.refusal import BatchRefused, hint_for, said
from live_migration.consumer.row_blocks import copy_rows
from live_migration.consumer.row_encoding import (
    UNCHANGED,
    CopyRow,
    Message,
    Value,
    binary_row,
    copy_chunks,
    text_row,
)
from live_migration.consumer.stretches import stretches
from live_migration.consumer.target_tables import TargetTable

_MOST_STAGES = 64
"""Staging tables that a session keeps: the server locks and empties every one of them at each COMMIT."""
_CLASHES = (asyncpg.UniqueViolationError, asyncpg.ExclusionViolationError)
_SESSION = "set local synchronous_commit = off; set constraints all deferred; set local jit = off"


class Applier:
    """Applies batches over one connection to the target."""

    def __init__(self, connection: asyncpg.Connection, lane: int) -> None:
        self._connection = connection
        self._lane = lane
        self._stages: set[str] = set()  # of this session
        self._used_stages: set[str] = set()  # of this transaction
        self._settings: str | None = None

    async def begin(self) -> None:
        """Begin a target transaction in which no trigger fires, where our role may have it so."""
        if self._settings is None:
            more = (await replica_role(self._connection), await session_settings(self._connection))
            self._settings = "; ".join([_SESSION, *filter(None, more)])
        self._used_stages.clear()
        if len(self._stages) > _MOST_STAGES:
            await self._connection.execute("discard temp")
            self._stages.clear()
        await self._connection.execute(f"begin; {self._settings}")

    async def apply(self, batch: Batch) -> None:
        """Apply a batch inside the transaction that `begin` opened.

        Raises:
            BatchRefused: the target refuses a change, or a change does not find exactly its row. Roll back.
        """
        for step in batch.steps:
            if isinstance(step, TruncateStep):
                await self._truncate(step)
            else:
                for run in all_runs(step):
                    if run.count:
                        await self._apply_run(run)

    async def _truncate(self, step: TruncateStep) -> None:
        names = {table.sql: table for table in step.tables}  # chunks stand for the same hypertable
        held = [sql for sql, table in names.items() if table.hypertable and table.hypertable.is_materialization]
        others = [sql for sql in names if sql not in held]
        try:
            for sql in held:
                await self._connection.execute(f"delete from {sql}")
            if others:
                await self._connection.execute(f"truncate {', '.join(others)}")
        except CONNECTION_ERRORS:
            raise
        except asyncpg.PostgresError as error:
            raise BatchRefused(
                f"TRUNCATE of {', '.join(str(t.name) for t in step.tables)} at {step.position} fails on the target: {said(error)}",
                reason=said(error),
            ) from error

    async def _apply_run(self, run: TableRun) -> None:
        try:
            if run.only_inserts:
                await self._insert(run)
            else:
                await self._apply_mixed(run)
        except CONNECTION_ERRORS:
            raise
        except asyncpg.PostgresError as error:
            self._refuse(run, error)
        except (struct.error, IndexError) as error:
            raise FormatError(f"{run.table.name}: a row message at or after {run.position(0)} is malformed") from error

    # runs of inserts

    async def _insert(self, run: TableRun) -> None:
        table = run.table
        if not table.columns:
            await self._connection.execute(f"insert into {table.name.sql} select from generate_series(1, {run.count})")
        else:
            binary = run.is_binary()
            rows = copy_rows(run.pieces(), binary=binary)
            await self._copy(table.name, _names(table), rows, run.count, binary=binary)

    async def _copy_rows(self, table: TargetTable, rows: Sequence[Sequence[bytes | None]], *, binary: bool) -> None:
        if rows:
            encode = binary_row if binary else text_row
            await self._copy(table.name, _names(table), map(encode, rows), len(rows), binary=binary)

    async def _copy(
        self,
        table: QualifiedName,
        columns: Sequence[str] | None,
        rows: Iterable[CopyRow],
        expected: int,
        *,
        binary: bool,
    ) -> None:
        """COPY encoded rows into a table and see that each arrived."""
        status = await self._connection.copy_to_table(
            table.name,
            schema_name=table.schema,
            columns=columns,
            source=while_connected(self._connection, _as_async(copy_chunks(rows, binary=binary))),
            format="binary" if binary else "text",
        )
        if (arrived := row_count(status)) != expected:
            raise BatchRefused(
                f"{table}: COPY took {arrived} of {expected} rows", reason=f"COPY took {arrived} of {expected} rows"
            )

    # mixed runs

    async def _apply_mixed(self, run: TableRun) -> None:
        table = run.table
        if not table.is_foldable and (table.key or not table.is_full):
            await self._in_source_order(run)
            return
        guarded = table.has_other_unique or table.has_always_identity
        if guarded:
            await self._connection.execute("savepoint run")
        try:
            if table.key:
                await self._apply_folded(run)
            else:
                await self._apply_whole_rows(run)
        except NotFoldable:
            if guarded:
                await self._connection.execute("rollback to savepoint run")
            await self._in_source_order(run)
        except _CLASHES:
            if not guarded:
                raise
            # folding lost the order between keys, which another unique index or an exclusion constraint needs
            await self._connection.execute("rollback to savepoint run")
            await self._in_source_order(run)
        if guarded:
            await self._connection.execute("release savepoint run")

    async def _apply_folded(self, run: TableRun) -> None:
        net, binary = take_net_changes(run), run.is_binary()
        if isinstance(net, PlainDeletes):
            await self._delete(run, net.keys, net.key_count, binary=binary)
        elif isinstance(net, PlainChanges):
            await self._apply_plain(run, net, binary=binary)
        else:
            await self._apply_net_effect(run, net, binary=binary)

    async def _apply_net_effect(self, run: TableRun, net: NetEffect, *, binary: bool) -> None:
        if net.deletes:
            encode = binary_row if binary else text_row
            await self._delete(run, map(encode, net.deletes), len(net.deletes), binary=binary)
        for present, updates in net.updates.items():
            await self._update(run, present, updates, binary=binary)
        await self._copy_rows(run.table, net.inserts, binary=binary)

    async def _delete(self, run: TableRun, keys: Iterable[CopyRow], count: int, *, binary: bool) -> None:
        table = run.table
        staged = _staged_key(table)
        stage = await self._stage(table, "d", statements.key_stage_columns(table), staged.values())
        await self._copy(stage, None, keys, count, binary=binary)
        hit = await self._change(
            table, stage, staged, lambda within: statements.delete_staged(table, stage.sql, within)
        )
        self._expect_rows(run, "DELETE", hit, count)

    async def _update(
        self,
        run: TableRun,
        present: Sequence[int],
        updates: Sequence[tuple[tuple[bytes | None, ...], list[bytes | None]]],
        *,
        binary: bool,
    ) -> None:
        table = run.table
        columns = statements.key_stage_columns(table) + statements.value_stage_columns(table, present)
        stage = await self._stage(table, "u", columns, _staged_key(table).values())
        encode = binary_row if binary else text_row
        await self._copy(stage, None, (encode([*key, *values]) for key, values in updates), len(updates), binary=binary)
        if table.hypertable is not None and hypertable_statements.moves_rows(table, present):
            rows = await self._hypertable_rows(table, table.hypertable)
            hit = await rows.move(stage.sql, _staged_key(table), present)
        elif statements.assigned(table, present):
            hit = await self._change(
                table,
                stage,
                _staged_key(table),
                lambda within: statements.update_staged(table, stage.sql, present, within),
            )
        else:
            hit = await self._connection.fetchval(statements.count_staged(table, stage.sql, present))
        if table.has_always_identity and hit != len(updates):
            raise NotFoldable("an identity column that is generated always may have changed")
        self._expect_rows(run, "UPDATE", hit, len(updates))

    async def _change(
        self,
        table: TargetTable,
        stage: QualifiedName,
        staged: Mapping[str, str],
        statement: Callable[[str], str],
    ) -> int:
        """Change the rows that are staged, a stretch of a hypertable at a time, and give how many were hit.

        `staged`: the columns that rows are found by -> their names on the stage; `statement`: makes one from a further condition.
        """
        hit = 0
        planning = statements.planning(table)
        for within in await stretches(self._connection, table, stage.sql, staged):
            hit += await execute(self._connection, f"{planning}; {statement(within)}")
        return hit

    async def _hypertable_rows(self, table: TargetTable, hypertable: HypertableInfo) -> HypertableRows:
        taken = await self._stage(table, "b", hypertable_statements.taken_columns(hypertable))
        await self._connection.execute(statements.planning(table))
        return HypertableRows(self._connection, table, hypertable, taken.sql)

    async def _apply_plain(self, run: TableRun, changes: PlainChanges, *, binary: bool) -> None:
        table = run.table
        if changes.deletes:
            await self._delete(run, changes.deletes, len(changes.deletes), binary=binary)
        if changes.update_count:
            await self._update_whole_rows(run, changes.updates, changes.update_count, binary=binary)
        if changes.insert_count:
            await self._copy(table.name, _names(table), changes.inserts, changes.insert_count, binary=binary)

    async def _update_whole_rows(self, run: TableRun, rows: Iterable[CopyRow], count: int, *, binary: bool) -> None:
        table = run.table
        every_column = statements.value_stage_columns(table, range(len(table.columns)))
        staged = {column.name: f"c{column.index}" for column in table.key}
        stage = await self._stage(table, "a", every_column, staged.values())
        await self._copy(stage, None, rows, count, binary=binary)
        hit = await self._change(
            table,
            stage,
            staged,
            lambda within: statements.update_whole_rows(table, stage.sql, within),
        )
        self._expect_rows(run, "UPDATE", hit, count)

    async def _apply_whole_rows(self, run: TableRun) -> None:
        table = run.table
        messages = run.messages()
        deletes, inserts = fold_whole_rows(messages)
        binary = run.is_binary()
        if deletes:
            every_column = statements.value_stage_columns(table, range(len(table.columns)))
            columns = [("seq", "int"), ("n", "int"), *every_column]
            stage = await self._stage(table, "w", columns)
            encode = binary_row if binary else text_row
            rows = (
                encode([_integer(seq, binary=binary), _integer(n, binary=binary), *row])
                for seq, (row, n) in enumerate(deletes.items())
            )
            await self._copy(stage, None, rows, len(deletes), binary=binary)
            if table.hypertable is None:
                statement = statements.delete_whole_rows(table, stage.sql)
                hit = await execute(self._connection, f"{statements.planning(table)}; {statement}")
            else:
                hit = await (await self._hypertable_rows(table, table.hypertable)).delete_equal(stage.sql)
            self._expect_rows(run, "DELETE", hit, deletes.total())
        await self._copy_rows(table, list(inserts.elements()), binary=binary)

    # source order

    async def _in_source_order(self, run: TableRun) -> None:
        table = run.table
        if not table.key and not table.is_full:
            raise BatchRefused(
                f"{table.name}: an UPDATE or DELETE at {run.position(0)} has no replica identity to find its row by",
                reason="no replica identity to find its row by",
                hint="Give the table a replica identity on the source before its changes are published.",
            )
        messages = run.messages()
        binary = run.is_binary()
        columns = statements.source_order_columns(table)
        stage = await self._stage(table, "s", columns)
        encode = binary_row if binary else text_row
        staged = [_staged_change(table, number, each, binary=binary) for number, each in enumerate(messages)]
        await self._copy(stage, None, map(encode, staged), len(staged), binary=binary)
        if table.hypertable is None:
            loop = statements.apply_in_source_order(table, stage.sql)
        else:
            taken = await self._stage(table, "b", hypertable_statements.taken_columns(table.hypertable))
            loop = hypertable_statements.apply_in_source_order(table, table.hypertable, stage.sql, taken.sql)
        try:
            await self._connection.execute(loop)
        except asyncpg.PostgresError as error:
            if error.sqlstate != statements.WRONG_ROW_COUNT:
                raise
            number = int(error.detail or 0)
            raise BatchRefused(
                f"{table.name}: the change at {run.position(number)}: {error.args[0]}",
                reason=str(error.args[0]),
                hint="The target's rows are not the source's: somebody wrote to the target, or the copy was not whole.",
            ) from error

    async def _stage(
        self, table: TargetTable, kind: str, columns: Sequence[tuple[str, str]], found_by: Collection[str] = ()
    ) -> QualifiedName:
        """Give an empty staging table for these columns. A rolled back savepoint may have taken it along: so ask each time.

        For a hypertable the columns that rows are found by have an index: the planner has been seen to take a chunk for
        empty that holds what was decompressed into it, and to read the whole stage for each of its rows.
        """
        name = f"lm_{crc32(table.name.sql.encode())}_{kind}_{crc32(repr(columns).encode())}"
        indexed = found_by if table.hypertable is not None else ()
        await self._connection.execute(statements.create_stage(name, columns, indexed))
        stage = QualifiedName("pg_temp", name)
        if name in self._used_stages:
            await self._connection.execute(f"truncate {stage.sql}")
        self._stages.add(name)
        self._used_stages.add(name)
        return stage

    # what the server said

    def _expect_rows(self, run: TableRun, verb: str, hit: int, expected: int) -> None:
        if hit != expected:
            first, last = run.position(0), run.position(run.count - 1)
            reason = f"{verb} hits {hit} rows where the source changed {expected}"
            raise BatchRefused(
                f"{run.table.name}: {reason}, between {first} and {last}",
                reason=reason,
                hint="The target's rows are not the source's: somebody wrote to the target, or the copy was not whole.",
            )

    def _refuse(self, run: TableRun, error: asyncpg.PostgresError) -> NoReturn:
        first, last = run.position(0), run.position(run.count - 1)
        where = f"at {first}" if first == last else f"between {first} and {last}"
        raise BatchRefused(
            f"{run.table.name}: the target refuses a change {where}: {said(error)}",
            reason=said(error),
            hint=hint_for(error),
        ) from error


def _staged_change(table: TargetTable, number: int, message: Message, *, binary: bool) -> list[bytes | None]:
    """Give a change as a row of the source order stage."""
    kind, old, new = decode_change(message)
    every = range(len(table.columns))
    before = old if old is not None else new
    assert before is not None
    if kind == pgoutput.INSERT:
        identity: list[bytes | None] = [None] * (len(table.key) or len(every))
    else:
        identity = [_whole(before[i]) for i in ([column.index for column in table.key] or every)]
    head = _integer(number, binary=binary)
    nothing: list[bytes | None] = [None] * len(every)
    if new is None:
        return [head, b"D", None, *identity, *nothing]
    values = [None if value is UNCHANGED else _whole(value) for value in new]
    present = bytes([48 if value is UNCHANGED else 49 for value in new])
    return [head, b"I" if kind == pgoutput.INSERT else b"U", present, *identity, *values]


def _whole(value: Value) -> bytes | None:
    if value is UNCHANGED:
        raise FormatError("a value that should be whole is not in the stream")
    return value


def _staged_key(table: TargetTable) -> dict[str, str]:
    """Give the key's columns and their names on a stage that has `key_stage_columns`."""
    return {column.name: f"k{i}" for i, column in enumerate(table.key)}


def _names(table: TargetTable) -> list[str]:
    return [column.name for column in table.columns]


def _integer(number: int, *, binary: bool) -> bytes:
    return number.to_bytes(4, "big") if binary else str(number).encode()


async def _as_async(chunks: Iterable[Message]) -> AsyncIterator[Message]:
    for chunk in chunks:
        yield chunk
