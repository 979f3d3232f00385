"""Tables that are made on the source during replay, and transactions that are open while they are published: decided by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import asyncpg

Kind = Literal["key", "nothing", "full", "partitioned"]
"""`nothing`: no key, only inserted into, so that a double shows; `full`: no key under REPLICA IDENTITY FULL."""
Fate = Literal["stays", "truncated", "dropped", "made again", "widened"]
Undo = Literal["none", "released", "rolled back"]

OLD_TABLES = ("app.by_key", "app.by_nothing_full", "app.insert_only")
_TAKEN_OUT = (*OLD_TABLES, "app.by_time", "app.by_part_1")
_COLUMNS = "id bigint, n int, note text"
_PARTITIONS = (("low", "minvalue", "1000"), ("high", "1000", "maxvalue"))


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows that a straddling transaction writes at once. `first`: the smallest key of them."""

    table: str
    first: int
    count: int
    is_copy: bool
    undo: Undo
    """What becomes of the savepoint that it is written in, if it is in one."""


@dataclass(frozen=True, slots=True)
class Straddle:
    """A transaction that begins before a table is published, and ends after."""

    begins_first: bool
    """Whether it has written before the table is made, or taken out."""
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    is_shown: bool
    """Whether another transaction changes the table after its publication and commits first: that tells the walsender of it."""

    seed: int
    """For whoever breaks something meanwhile."""

    @property
    def rows(self) -> int:
        """How many it writes for good."""
        return sum(piece.count for piece in (*self.before, *self.after) if piece.undo != "rolled back")


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A table, and what becomes of it. `delay`: seconds from the beginning of replay."""

    name: str
    kind: Kind
    delay: float
    rows: int
    straddle: Straddle | None
    fate: Fate
    fate_delay: float

    @property
    def creation(self) -> str:
        """Statements that make it, also where an earlier try came through unheard."""
        drop = f"drop table if exists {self.name};"
        match self.kind:
            case "key":
                return f"{drop} create table {self.name} (id bigserial primary key, n int, note text); create index on {self.name} (n)"
            case "nothing":
                return f"{drop} create table {self.name} ({_COLUMNS})"
            case "full":
                return f"{drop} create table {self.name} ({_COLUMNS}); alter table {self.name} replica identity full"
            case "partitioned":
                parts = "; ".join(
                    f"create table {self.name}_{part} partition of {self.name} for values from ({low}) to ({high})"
                    for part, low, high in _PARTITIONS
                )
                return f"{drop} create table {self.name} ({_COLUMNS}) partition by range (id); {parts}"


@dataclass(frozen=True, slots=True)
class TakenOut:
    """A table of the plan that somebody takes out of our publications; the coordinator puts it in again."""

    table: str
    delay: float
    straddle: Straddle


@dataclass(frozen=True, slots=True)
class NewcomerPlan:
    """What a round makes and takes out during replay. `share`: of the random statements, that go to newcomers."""

    newcomers: tuple[Newcomer, ...]
    taken_out: tuple[TakenOut, ...]
    share: float


def plan_newcomers(seed: int) -> NewcomerPlan:
    """Decide about two to five newcomers, most of them straddled, and in one round of four a table that is taken out."""
    rng = random.Random(f"newcomers {seed}")
    newcomers = tuple(_newcomer(rng, f"app.new_{number}") for number in range(rng.randrange(2, 6)))
    taken_out: tuple[TakenOut, ...] = ()
    if rng.random() < 0.25:
        table = rng.choice(_TAKEN_OUT)
        taken_out = (TakenOut(table, rng.uniform(0, 15), _straddle(rng, table)),)
    return NewcomerPlan(newcomers, taken_out, rng.choice((0.05, 0.15)))


def _newcomer(rng: random.Random, name: str) -> Newcomer:
    kind: Kind = rng.choices(("key", "nothing", "full", "partitioned"), weights=(3, 3, 3, 1))[0]
    straddle = _straddle(rng, name) if kind != "partitioned" and rng.random() < 0.7 else None
    fates: tuple[Fate, ...] = ("stays", "truncated", "dropped", "made again", "widened")
    fate = rng.choices(fates, weights=(5, 1, 1, 1, 1))[0]
    if kind == "partitioned":  # its partitions cannot be brought: the cutover is refused while they are there
        fate = "dropped"
    return Newcomer(
        name, kind, rng.uniform(0, 15), rng.choice((0, 50, 500)), straddle, fate, rng.choice((0.0, rng.uniform(0, 12)))
    )


def _straddle(rng: random.Random, table: str) -> Straddle:
    return Straddle(
        begins_first=rng.random() < 0.5,
        before=tuple(_pieces(rng, table, rng.randrange(3, 7))),
        after=tuple(_pieces(rng, table, rng.randrange(6, 12))),
        is_shown=rng.random() < 0.8,
        seed=rng.getrandbits(64),
    )


def _pieces(rng: random.Random, table: str, count: int) -> Iterator[Piece]:
    """Give pieces of the table and of old ones in any order, one of the table and one of another at the least."""
    old = [each for each in OLD_TABLES if each != table]
    tables = [table, rng.choice(old), *(rng.choice((table, *old)) for _ in range(count - 2))]
    rng.shuffle(tables)
    for each in tables:
        undo: Undo = rng.choices(("none", "released", "rolled back"), weights=(4, 2, 1))[0]
        yield Piece(each, rng.randrange(3 * 10**9, 10**15), rng.randrange(20, 200), rng.random() < 0.3, undo)


async def write_piece(c: asyncpg.Connection, piece: Piece) -> None:
    """Write the rows of a piece, in a savepoint of their own where it says so."""
    if piece.undo == "none":
        await _write(c, piece)
        return
    savepoint = c.transaction()
    await savepoint.start()
    await _write(c, piece)
    await (savepoint.commit() if piece.undo == "released" else savepoint.rollback())


async def _write(c: asyncpg.Connection, piece: Piece) -> None:
    schema, _, name = piece.table.partition(".")
    columns, values = _ROWS.get(piece.table, _ROW_OF_NEWCOMER)
    query = f"select {values} from generate_series($1::bigint + 1, $1::bigint + $2::int) i"
    if piece.is_copy:
        records = await c.fetch(query, piece.first, piece.count)
        await c.copy_records_to_table(name, schema_name=schema, columns=columns.split(", "), records=records)
        return
    await c.execute(f"insert into {piece.table} ({columns}) {query}", piece.first, piece.count)


_ROW_OF_NEWCOMER = ("id, n, note", "i, (i % 1000)::int, repeat('new ', 50)")
_ROWS = {
    "app.by_key": ("id, n, note", "i, (i % 1000)::int, repeat('old ', 50)"),
    "app.by_nothing_full": ("a, b, amount", "(i % 100000)::int, repeat('old ', 40), 1.0"),
    "app.insert_only": ("at, line", "now(), repeat('old ', 40) || i"),
    "app.by_time": ("at, device, value", "now(), 'straddle ' || i, 0.5::float8"),
    "app.by_part_1": ("id, region, n", "(3000 + i % 2000000000)::int, 1, 1"),
}
"""Columns and values of each old table's rows, by number."""


class NewcomerGone(Exception):
    """The table is being dropped: the transaction is to be begun anew without it."""


async def newcomer_statement(c: asyncpg.Connection, rng: random.Random, newcomers: Sequence[Newcomer]) -> None:
    """Run one random statement on one of the newcomers.

    Raises:
        NewcomerGone: it was dropped meanwhile.
    """
    newcomer = rng.choice(newcomers)
    try:
        await _change(c, rng, newcomer)
    except asyncpg.UndefinedTableError as error:
        raise NewcomerGone from error
    except asyncpg.InternalServerError as error:
        if "could not open relation" not in str(error):
            raise
        raise NewcomerGone from error


async def _change(c: asyncpg.Connection, rng: random.Random, newcomer: Newcomer) -> None:
    table, kind = newcomer.name, rng.randrange(12)
    number = rng.randrange(1, 2000)
    if kind == 0 and rng.random() < 0.3:
        # Not for long: a transaction that straddles holds it to its end.
        await c.execute(f"set local lock_timeout = '300ms'; truncate {table}; set local lock_timeout = 0")
    elif kind < 6 or newcomer.kind in ("nothing", "partitioned"):
        first, count = number if newcomer.kind != "key" else rng.randrange(10**6, 3 * 10**9), rng.choice((1, 1, 3, 20))
        await c.execute(
            f"insert into {table} (id, n, note) select $1::bigint + i, i, 'random' from generate_series(1, $2::int) i",
            first,
            count,
        )
    elif newcomer.kind == "key":
        await _change_by_key(c, table, kind, number)
    else:
        one = f"ctid = (select ctid from {table} where n = $1 limit 1)"
        change = f"delete from {table}" if kind < 8 else f"update {table} set note = note || '.'"
        await c.execute(f"{change} where {one}", number % 20 + 1)


async def _change_by_key(c: asyncpg.Connection, table: str, kind: int, number: int) -> None:
    if kind < 8:
        await c.execute(f"delete from {table} where id = $1", number)
    elif kind < 10:
        await c.execute(f"update {table} set n = n + 1, note = note || '.' where id = $1", number)
    elif kind == 10:
        await c.execute(f"update {table} set id = -id where id = $1", number)
    else:
        await c.execute(f"insert into {table} (n, note) values ($1, 'by sequence')", number)
