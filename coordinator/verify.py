"""Compare source and target: row count and an order-free digest of each table's content, made on the servers; sequences."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from enum import Enum

import asyncpg

from live_migration.common import postgres
from live_migration.common.catalog import (
    ColumnInfo,
    SequenceParameters,
    TableInfo,
    list_tables,
    sequence_parameters,
    sequence_positions,
)
from live_migration.common.errors import LiveMigrationError
from live_migration.common.postgres import Side, set_lock_timeout
from live_migration.common.relation import QualifiedName, quote_identifier
from live_migration.common.settings import Settings
from live_migration.common.tasks import TaskGroup
from live_migration.common.timescale import read_layout
from live_migration.coordinator.skip import Skip, read_skips, skips_as_dicts

BYTEA_OID = 17
JOBS = 4

_LARGE_OBJECTS = """
    select count(*) as count, coalesce(sum(('x' || substr(h, 1, 16))::bit(64)::bigint::numeric), 0)::text || ':' ||
           coalesce(sum(('x' || substr(h, 17))::bit(64)::bigint::numeric), 0)::text as digest
    from (select md5(oid::text || ':' || md5(lo_get(oid))) as h from pg_largeobject_metadata) hashes
"""


class Verdict(Enum):
    """What a comparison found."""

    EQUAL = "equal"
    DIFFERENT = "different"
    MISSING_ON_TARGET = "missing on target"
    MISSING_ON_SOURCE = "missing on source"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Content:
    """Row count of a table and the digest of its rows, whatever their order; equal rows count each."""

    row_count: int
    digest: str


@dataclass(frozen=True, slots=True)
class Result:
    """One table, sequence or kind of object, compared."""

    kind: str
    name: str
    verdict: Verdict
    source_rows: int | None = None
    target_rows: int | None = None
    detail: str = ""


@dataclass(slots=True)
class Report:
    """All comparisons. `seconds`: how long they took; `skips`: changes that the target lacks because the user gave them up."""

    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    skips: tuple[Skip, ...] = ()

    @property
    def differences(self) -> list[Result]:
        """Whatever is not equal, or could not be compared."""
        return [result for result in self.results if result.verdict is not Verdict.EQUAL]

    @property
    def is_equal(self) -> bool:
        """Whether everything was compared and is equal."""
        return not self.differences

    def as_dict(self) -> dict[str, object]:
        """Give the report for JSON."""
        results = [{**asdict(result), "verdict": result.verdict.value} for result in self.results]
        skips = skips_as_dicts(self.skips)
        return {"equal": self.is_equal, "seconds": round(self.seconds, 3), "results": results, "skips": skips}


def digest_statement(table: TableInfo, columns: list[ColumnInfo], *, is_utf8: bool) -> str:
    """Give the query for a table's Content: sums of both halves of an MD5 of each row's text.

    Values are compared by their text form, so -0.0 is not 0.0 and 1.00 is not 1.0. bytea goes in by its own digest,
    which spares the server a text twice its size.

    Args:
        table: to be read; a hypertable with all its chunks.
        columns: in the same order on both sides.
        is_utf8: whether both databases are in UTF8; else texts are converted first.
    """
    values = ", ".join(
        f"md5(t.{quote_identifier(column.name)})"
        if column.type_oid == BYTEA_OID
        else f"t.{quote_identifier(column.name)}"
        for column in columns
    )
    row = f"row({values})::text"
    hashed = f"md5({row})" if is_utf8 else f"md5(convert_to({row}, 'UTF8'))"
    return (
        "select count(*) as row_count,"
        " coalesce(sum(('x' || substr(h, 1, 16))::bit(64)::bigint::numeric), 0)::text || ':' ||"
        " coalesce(sum(('x' || substr(h, 17))::bit(64)::bigint::numeric), 0)::text as digest"
        f" from (select {hashed} as h from {table.sql} t) hashes"
    )


async def verify(
    settings: Settings, *, jobs: int = JOBS, observe: Callable[[Result], None] = lambda result: None
) -> Report:
    """Compare every table, sequence and large object of source and target.

    Args:
        jobs: tables compared at a time, each on a connection of its own to either side.
        observe: told each result as it comes.

    Raises:
        LiveMigrationError: a side cannot be reached, or its tables cannot be listed.
    """
    began = time.monotonic()
    report = Report()

    def tell(result: Result) -> None:
        report.results.append(result)
        observe(result)

    async with AsyncExitStack() as stack:
        pair = await _open_pair(settings, stack)
        with postgres.asking("target", "reading what was skipped"):
            report.skips = await read_skips(pair.target)
        pairs, is_utf8 = await _plan(pair, settings.lock_timeout, tell)
        await _compare_tables(settings, pairs, min(jobs, len(pairs)), is_utf8, tell)
        await _compare_sequences(pair, tell)
        await _compare_large_objects(pair, tell)
    report.results.sort(key=lambda result: (result.kind, result.name))
    report.seconds = time.monotonic() - began
    return report


@dataclass(frozen=True, slots=True)
class _Pair:
    source: asyncpg.Connection
    target: asyncpg.Connection


@dataclass(frozen=True, slots=True)
class _TablePair:
    name: QualifiedName
    source: TableInfo
    target: TableInfo


async def _open_pair(settings: Settings, stack: AsyncExitStack) -> _Pair:
    async def connect(uri: str, side: Side) -> asyncpg.Connection:
        return await stack.enter_async_context(postgres.session(uri, side, application="live-migration verify"))

    return _Pair(await connect(settings.source_uri(), "source"), await connect(settings.target_uri(), "target"))


async def _plan(pair: _Pair, lock_timeout: float, tell: Callable[[Result], None]) -> tuple[list[_TablePair], bool]:
    """Match the tables of both sides by name, biggest first, and tell those that stand on one side only."""
    sides: list[dict[QualifiedName, TableInfo]] = []
    encodings, has_timescale = [], []
    for connection, side in _sides(pair):
        with postgres.asking(side, "listing the tables"):
            async with connection.transaction(readonly=True):
                await connection.execute(set_lock_timeout(lock_timeout))  # reading a table's size takes a lock
                layout = await read_layout(connection)
                has_timescale.append(layout is not None)
                # What an aggregate materializes into may have another name on the other side.
                views = {each.oid: each.view for each in layout.hypertables.values() if each.view} if layout else {}
                tables = [table for table in await list_tables(connection) if table.is_users]
                sides.append({views.get(table.oid, table.name): table for table in tables})
            encodings.append(await connection.fetchval("show server_encoding"))
    source, target = sides
    if not has_timescale[1]:  # plain tables alone: it cannot have aggregates
        source = {name: table for name, table in source.items() if name == table.name}
    for name in source.keys() - target.keys():
        tell(Result("table", str(name), Verdict.MISSING_ON_TARGET))
    for name in target.keys() - source.keys():
        tell(Result("table", str(name), Verdict.MISSING_ON_SOURCE))
    both = [_TablePair(name, source[name], target[name]) for name in source.keys() & target.keys()]
    both.sort(key=lambda each: (each.source.size_bytes, each.name), reverse=True)
    return both, encodings == ["UTF8", "UTF8"]


def _sides(pair: _Pair) -> tuple[tuple[asyncpg.Connection, Side], tuple[asyncpg.Connection, Side]]:
    return (pair.source, "source"), (pair.target, "target")


async def _compare_tables(
    settings: Settings, pairs: list[_TablePair], jobs: int, is_utf8: bool, tell: Callable[[Result], None]
) -> None:
    waiting = iter(pairs)

    async def work() -> None:
        async with AsyncExitStack() as stack:
            pair = await _open_pair(settings, stack)
            for each in waiting:
                tell(await _compare_table(pair, each, is_utf8, settings.lock_timeout))

    async with TaskGroup() as group:
        for _ in range(jobs):
            group.create_task(work())


async def _compare_table(pair: _Pair, tables: _TablePair, is_utf8: bool, lock_timeout: float) -> Result:
    name = str(tables.name)
    on_target = {column.name: column for column in tables.target.columns}
    on_source = {column.name: column for column in tables.source.columns}
    if missing := [column for column in on_source if column not in on_target]:
        return Result("table", name, Verdict.DIFFERENT, detail=f"columns missing on target: {', '.join(missing)}")
    if extra := [column for column in on_target if column not in on_source]:
        return Result("table", name, Verdict.DIFFERENT, detail=f"columns missing on source: {', '.join(extra)}")
    columns = list(tables.source.columns)
    source, target = await asyncio.gather(
        _read_content(pair.source, "source", tables.source, columns, is_utf8, lock_timeout),
        _read_content(
            pair.target, "target", tables.target, [on_target[c.name] for c in columns], is_utf8, lock_timeout
        ),
        return_exceptions=True,  # else the other would go on with its connection
    )
    for content in (source, target):
        if isinstance(content, LiveMigrationError):
            return Result("table", name, Verdict.FAILED, detail=content.message)
        if isinstance(content, BaseException):
            raise content
    assert isinstance(source, Content)
    assert isinstance(target, Content)
    verdict = Verdict.EQUAL if source == target else Verdict.DIFFERENT
    detail = "same number of rows, other content" if source.row_count == target.row_count else "other number of rows"
    return Result(
        "table", name, verdict, source.row_count, target.row_count, "" if verdict is Verdict.EQUAL else detail
    )


async def _read_content(
    connection: asyncpg.Connection,
    side: Side,
    table: TableInfo,
    columns: list[ColumnInfo],
    is_utf8: bool,
    lock_timeout: float,
) -> Content:
    with postgres.asking(side, f"reading {table.name}"):
        async with connection.transaction(readonly=True):
            await connection.execute(set_lock_timeout(lock_timeout))
            row = await connection.fetchrow(digest_statement(table, columns, is_utf8=is_utf8))
    return Content(row["row_count"], row["digest"])


async def _compare_sequences(pair: _Pair, tell: Callable[[Result], None]) -> None:
    source, target = [await _read_sequences(connection, side) for connection, side in _sides(pair)]
    for name in sorted(source.keys() | target.keys()):
        if name not in target:
            tell(Result("sequence", str(name), Verdict.MISSING_ON_TARGET))
        elif name not in source:
            tell(Result("sequence", str(name), Verdict.MISSING_ON_SOURCE))
        elif source[name] != target[name]:
            here, there = source[name], target[name]
            detail = f"source at {here.at}, target at {there.at}" if here.at != there.at else ""
            if here.parameters != there.parameters:
                detail += f"{'; ' if detail else ''}source {here.parameters.clauses}, target {there.parameters.clauses}"
            tell(Result("sequence", str(name), Verdict.DIFFERENT, detail=detail))
        else:
            tell(Result("sequence", str(name), Verdict.EQUAL))


@dataclass(frozen=True, slots=True)
class _Sequence:
    at: str
    parameters: SequenceParameters


async def _read_sequences(connection: asyncpg.Connection, side: Side) -> dict[QualifiedName, _Sequence]:
    """Give last value, `is_called` and parameters of every sequence."""
    with postgres.asking(side, "reading sequences"):
        parameters = await sequence_parameters(connection)
        return {
            name: _Sequence(f"{last_value} ({'called' if is_called else 'not called'})", parameters[name])
            async for some in sequence_positions(connection)
            for name, last_value, is_called in some
            if name in parameters  # else it was made just now
        }


async def _compare_large_objects(pair: _Pair, tell: Callable[[Result], None]) -> None:
    contents = []
    for connection, side in _sides(pair):
        try:
            with postgres.asking(side, "reading large objects"):
                row = await connection.fetchrow(_LARGE_OBJECTS)
        except LiveMigrationError as error:
            tell(Result("large objects", "all", Verdict.FAILED, detail=error.message))
            return
        contents.append(Content(row["count"], row["digest"]))
    source, target = contents
    if source.row_count or target.row_count:
        verdict = Verdict.EQUAL if source == target else Verdict.DIFFERENT
        tell(Result("large objects", "all", verdict, source.row_count, target.row_count))
