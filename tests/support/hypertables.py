"""Tables of every kind that a hypertable on the target may take rows for, and a random workload on their sources."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import asyncpg

TABLES = ("keyed", "odd", "equal", "twice", "numbered")

_COLUMNS = {
    "keyed": "time timestamptz not null, device text not null, n int, big text, primary key (time, device)",
    "odd": "code numeric not null, time timestamptz not null, device text, n int, big text, primary key (time, code)",
    "equal": "time timestamptz not null, device text, n numeric, big text",
    "twice": """time timestamptz not null, device text not null, n int, big text, number bigint generated always as identity,
                doubled int generated always as (n * 2) stored, primary key (device, time)""",
    "numbered": "at int not null, k int not null, n int, big text, primary key (at, k)",
}
DAYS, MINUTES, DEVICES = 8, 6, 5


def source_schema() -> str:
    """Make the tables as a source has them, `by_id` among them, whose key lacks what its chunks are made by."""
    tables = "".join(
        f"create table {name} ({columns}); alter table {name} alter big set storage external;"
        for name, columns in _COLUMNS.items()
    )
    return f"""{tables}
        create unique index on twice (time, n) where n < 1000000;
        alter table equal replica identity full;
        create table by_id (id int primary key, time timestamptz not null, n int, big text);
        alter table by_id alter big set storage external;"""


def make_hypertables(*, by_id: bool) -> str:
    """Make hypertables of the tables; a target's `by_id` has the key that it has to have there."""
    made = """
        select create_hypertable('keyed', 'time', chunk_time_interval => interval '1 day');
        select create_hypertable('odd', 'time', chunk_time_interval => interval '1 day');
        select create_hypertable('equal', 'time', chunk_time_interval => interval '1 day');
        select create_hypertable('twice', 'time', chunk_time_interval => interval '2 days');
        select create_hypertable('numbered', 'at', partitioning_column => 'k', number_partitions => 2, chunk_time_interval => 10);
    """
    if by_id:
        made += """alter table by_id drop constraint by_id_pkey, add primary key (id, time);
                   select create_hypertable('by_id', 'time', chunk_time_interval => interval '1 day');"""
    return made


def enable_compression(*, by_id: bool) -> str:
    segments = {"keyed": "device", "odd": "device", "equal": "device", "twice": "", "numbered": "k"}
    if by_id:
        segments["by_id"] = ""
    options = {
        name: f", timescaledb.compress_segmentby = '{segment}'" if segment else "" for name, segment in segments.items()
    }
    return "".join(f"alter table {name} set (timescaledb.compress{option});" for name, option in options.items())


async def compress_half(target: asyncpg.Connection, tables: Sequence[str], rng: random.Random) -> int:
    """Compress about half of the chunks, those again that have rows beside their batches; give how many."""
    compressed = 0
    for table in tables:
        for row in await target.fetch("select c::text from show_chunks($1::regclass) c order by 1", table):
            if rng.random() < 0.5:
                await target.execute(f"select compress_chunk('{row[0]}')")
                compressed += 1
    return compressed


def initial_rows() -> str:
    """Fill the tables; every chunk that the workload writes to exists from then on."""
    time = "timestamptz '2026-03-01' + day * interval '1 day' + minute * interval '1 minute'"
    grid = (
        f"generate_series(0, {DAYS - 1}) day, generate_series(0, {MINUTES - 1}) minute, generate_series(1, {DEVICES}) d"
    )
    big = "case when d % 2 = 0 then repeat('x', 5000) || d else 'short' end"
    number = "(day * 1000 + minute * 10 + d)"
    return f"""
        insert into keyed select {time}, 'd' || d, {number}, {big} from {grid} where d < 4;
        insert into odd select d, {time}, 'd' || d % 2, {number}, {big} from {grid} where d < 4;
        insert into equal select {time}, case when d > 1 then 'd' || d % 3 end, d % 2, null from {grid}, generate_series(1, 2);
        insert into twice (time, device, n, big) select {time}, 'd' || d, {number}, {big} from {grid} where d < 4;
        insert into numbered select day * 10 + minute, d, {number}, {big} from {grid} where d < 4;
        insert into by_id select {number}, {time}, {number}, {big} from {grid} where d < 4;"""


class HypertableWorkload:
    """Random transactions, one after another, on a source; `tables` are those that it writes to."""

    def __init__(self, source: asyncpg.Connection, rng: random.Random, tables: Sequence[str]) -> None:
        self._source = source
        self._rng = rng
        self._tables = tables
        self._fresh = 1_000_000
        self.kinds: Counter[str] = Counter()

    async def run(self, transactions: int) -> None:
        for _ in range(transactions):
            async with self._source.transaction():
                for _ in range(self._rng.choice((1, 1, 2, 5, 20))):
                    await self._statement()

    async def _statement(self) -> None:
        table = self._rng.choice(self._tables)
        kind = self._rng.choice(("insert", "insert", "update", "update", "update", "key", "move", "delete"))
        try:
            async with self._source.transaction():
                status = await self._source.execute(self._sql(table, kind))
        except asyncpg.UniqueViolationError:
            return
        except asyncpg.CheckViolationError:  # a hypertable refuses to move a row
            return
        self.kinds[f"{table} {kind}"] += int(status.rpartition(" ")[2])

    def _time(self) -> str:
        day, minute = self._rng.randrange(DAYS), self._rng.randrange(MINUTES)
        return f"timestamptz '2026-03-01' + interval '{day} days {minute} minutes'"

    def _sql(self, table: str, kind: str) -> str:
        self._fresh += 1
        rng, fresh = self._rng, self._fresh
        device = f"'d{rng.randrange(1, DEVICES + 1)}'"
        big = rng.choice(("null", "'s'", f"repeat('y', 4000) || {fresh}"))
        code = rng.choice(("1", "1.0", "2.00", "3", "4"))
        at = f"{rng.randrange(DAYS) * 10 + rng.randrange(MINUTES)}"
        k, time = rng.randrange(1, DEVICES + 1), self._time()
        some = {
            "keyed": rng.choice(
                (f"time = {self._time()} and device = {device}", f"time = {self._time()}", f"device = {device}")
            ),
            "odd": f"time = {self._time()} and code = {code}",
            "equal": f"time = {time} and ctid = any(array(select ctid from equal where time = {time} limit {rng.choice((1, 2, 4))}))",
            "twice": rng.choice((f"time = {self._time()} and device = {device}", f"time = {self._time()}")),
            "numbered": f"at = {at}" + rng.choice(("", f" and k = {k}")),
            "by_id": f"id = {rng.randrange(DAYS) * 1000 + rng.randrange(MINUTES) * 10 + k}",
        }[table]
        move = (
            "at = at + 10 * (1 - 2 * (at / 40))"
            if table == "numbered"
            else "time = time + interval '1 day' * sign(extract(day from timestamptz '2026-03-05' - time) - 0.5)"
        )
        key = {
            "keyed": "device = device || 'x'",
            "odd": rng.choice(("code = code + 10", "code = code * 1.0", "time = time + interval '10 minutes'")),
            "equal": rng.choice(("n = n * 1.0", "n = 1", "device = null")),
            "twice": rng.choice(("number = default", f"n = {fresh}", "n = n + 1", "device = device || 'x'")),
            "numbered": "k = k + 10",
            "by_id": f"id = {fresh}",
        }[table]
        insert = {
            "keyed": f"({self._time()}, {device}, {fresh}, {big})",
            "odd": f"({code}, {self._time()}, {device}, {fresh}, {big})",
            "equal": f"({self._time()}, {rng.choice((device, 'null'))}, {rng.choice(('1', '1.0', '2'))}, {rng.choice(('null', big))})",
            "twice": f"({self._time()}, {device}, {rng.choice((fresh, rng.randrange(8000)))}, {big})",
            "numbered": f"({at}, {k}, {fresh}, {big})",
            "by_id": f"({rng.choice((fresh, k))}, {self._time()}, {fresh}, {big})",
        }[table]
        columns = " (time, device, n, big)" if table == "twice" else ""
        return {
            "insert": f"insert into {table}{columns} values {insert}",
            "update": f"update {table} set {rng.choice((f'n = {fresh}', 'n = n', f'big = {big}', f'n = {fresh}, big = {big}'))} where {some}",
            "key": f"update {table} set {key} where {some}",
            "move": f"update {table} set {move} where {some}",
            "delete": f"delete from {table} where {some}",
        }[kind]


async def rows_of(uri: str, table: str) -> Counter[str]:
    """Give every row as text, and how often it is there."""
    connection = await asyncpg.connect(uri)
    try:
        return Counter(
            {r[0]: r[1] for r in await connection.fetch(f"select t::text, count(*) from {table} t group by 1")}
        )
    finally:
        await connection.close()
