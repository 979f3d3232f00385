"""Consumers as separate commands that join, leave, die and hang while the others go on; then every row is compared.

The settings are the defaults, but for the size of a part. Two time limits are asserted: the promise itself, that what a dead or stopped
consumer was at is in the hands of another within 30 s; and that nobody else waits for it meanwhile, as the lanes of all would for the
session of a dead member, or copies for a dead one's lease.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import asyncpg
import pytest

from live_migration.common.settings import load_settings
from live_migration.consumer.assignment import SESSION_SECONDS
from tests.e2e.processes import Cli
from tests.e2e.services import CopyWatch, LaneWatch, Service, Services
from tests.support.workload import Workload, differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

PROMISED_SECONDS = 30
LONGEST_PAUSE_IN_COPY = load_settings({}).lease
"""Who stays does not wait for the lease of who left to run out."""

GATES = """
    create function public.gate(number int) returns boolean language plpgsql as $$
    begin
        if number < 0 then perform pg_advisory_xact_lock_shared(1, -number); end if;
        if number % 20 = 0 and not pg_try_advisory_xact_lock_shared(2, 0) then perform pg_sleep(0.03); end if;
        return true;
    end $$;
    create function public.gate_of_index(number int) returns int immutable language plpgsql as $$
    begin perform public.gate(number); return number; end $$;
    create domain public.gated as int check (public.gate(value));
"""
"""On the target, a row with the number -n, or an index over one, waits while somebody holds advisory lock (1, n); while (2, 0)
is held, rows are slow."""


@asynccontextmanager
async def gates(uri: str, *keys: tuple[int, int]) -> AsyncIterator[asyncpg.Connection]:
    """Hold advisory locks on the target."""
    connection = await asyncpg.connect(uri)
    try:
        for key in keys:
            await connection.execute("select pg_advisory_lock($1, $2)", *key)
        yield connection
    finally:
        await connection.close()


async def open_gate(connection: asyncpg.Connection, *key: int) -> None:
    assert await connection.fetchval("select pg_advisory_unlock($1, $2)", *key)


COPIED = ("big", "other", "small")
COPY_SCHEMA = f"""
    {GATES}
    create table big (id int not null, n gated, v text);
    create table other (id int primary key, n gated, v text);
    create table small (id int primary key, n int);
    insert into big select i, i, repeat('x', 60) from generate_series(1, 30000) i;
    insert into other select i, i, repeat('y', 60) from generate_series(1, 25000) i;
    insert into small select i, case when i = 9 then -7 else i end from generate_series(1, 100) i;
    create index gated_index on small (gate_of_index(n));
    create index on big (v, id); create index on other (v);
"""
DONE_PARTS = "select count(*) from _live_migration.parts where state = 'done'"
WORKS_ON_PARTS = "select count(*) > 0 from _live_migration.parts where owner like $1 and state = 'copying'"
WORK = """
    select 'table ' || oid as work, state, owner from _live_migration.tables
    union all select format('part %s of %s, attempt %s', part, oid, attempt), state, owner from _live_migration.parts
    union all select 'index ' || oid, state, owner from _live_migration.indexes
"""
"""A part of an attempt that is given up is no work any more: its table is."""
HELD_BY = f"""
    select coalesce(array_agg(work), '{{}}') from ({WORK}) w where state in ('copying', 'building') and owner like any($1)
"""
IN_OTHER_HANDS = f"""
    select not exists (select from ({WORK}) w where work = any($2) and not (
        state in ('copied', 'ready', 'done') or state in ('copying', 'building') and not owner like any($1)))
"""
BEGUN_ANEW = """
    select not exists (select from _live_migration.tables where state = 'copying' and owner like $1)
       and exists (select from _live_migration.tables where attempt > 1 and state <> 'planned')
"""
"""All tables are free and one is another's: the other one is begun when no part of this one waits."""


async def taken_over(services: Services, *dead: Service) -> float:
    """Let each thing that the dead were at be in another's hands, or done, within the promised time; give the seconds that this took."""
    owners = [service.owner for service in dead]
    held = await services.target.fetchval(HELD_BY, owners)
    assert held
    began = time.monotonic()
    await services.until(IN_OTHER_HANDS, owners, held, timeout=PROMISED_SECONDS)
    return time.monotonic() - began


async def test_copy_and_index_build_go_on_whoever_dies_or_hangs(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(COPY_SCHEMA)
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    services = Services(cli, unique_name, tmp_path, part_size=65536, partitions=4, cutover="auto")
    async with gates(target_database, (2, 0), (1, 7)) as gate, services, CopyWatch(target_database) as watch:
        [holder] = await services.consumers(1)
        is_shared = "select count(*) = 2 from _live_migration.tables where snapshot_id is not null and owner like $1"
        await services.until(is_shared, holder.owner)
        await services.until(WORKS_ON_PARTS, holder.owner)
        watch.forget()
        killed, stopped, living = await services.consumers(3)
        for guest in (killed, stopped, living):
            await services.until(WORKS_ON_PARTS, guest.owner)
        print(f"longest pauses while three join: {watch.longest_pauses()}")
        assert watch.longest_pause(holder) < LONGEST_PAUSE_IN_COPY

        # two that only copy: one dies, one hangs; the snapshots' holder and the third go on
        watch.forget()
        killed.send(signal.SIGKILL)
        stopped.send(signal.SIGSTOP)
        done = await services.target.fetchval(DONE_PARTS)
        seconds = await taken_over(services, killed, stopped)
        print(
            f"parts of a killed and a stopped consumer taken over after {seconds:.1f} s; longest pauses {watch.longest_pauses()}"
        )
        assert max(watch.longest_pause(holder), watch.longest_pause(living)) < LONGEST_PAUSE_IN_COPY
        assert await services.target.fetchval(DONE_PARTS) > done
        assert await services.target.fetchval("select max(attempt) from _live_migration.tables") == 1

        # the holder dies: its tables begin anew, without a stop of the other
        watch.forget()
        holder.send(signal.SIGKILL)
        began = time.monotonic()
        await services.until(BEGUN_ANEW, holder.owner, timeout=PROMISED_SECONDS)
        seconds = time.monotonic() - began
        await services.until("select count(*) > 0 from _live_migration.parts where state = 'done' and attempt > 1")
        print(f"tables of the killed holder begun anew after {seconds:.1f} s; longest pauses {watch.longest_pauses()}")
        assert watch.longest_pause(living) < LONGEST_PAUSE_IN_COPY

        # a guest comes and leaves in order; the stopped one wakes up, finds its claims gone, and joins in
        watch.forget()
        [guest] = await services.consumers(1)
        await services.until(WORKS_ON_PARTS, guest.owner)
        assert await guest.terminate() == 0
        assert await services.target.fetchval(HELD_BY, [guest.owner]) == []
        stopped.send(signal.SIGCONT)
        await services.until(WORKS_ON_PARTS, stopped.owner)
        print(f"longest pauses while one comes, one leaves and one wakes up: {watch.longest_pauses()}")
        assert watch.longest_pause(living) < LONGEST_PAUSE_IN_COPY
        await open_gate(gate, 2, 0)

        # whoever builds the index hangs
        builder = "select owner from _live_migration.indexes where name = 'gated_index' and state = 'building'"
        await services.until("select count(*) > 0 from pg_locks where not granted and classid = 1 and objid = 7")
        owner = await services.until(builder)
        first, second = (living, stopped) if f"-{living.pid}-" in owner else (stopped, living)
        first.send(signal.SIGSTOP)
        seconds = await taken_over(services, first)
        print(f"index of a stopped consumer taken over after {seconds:.1f} s")
        others = "select bool_and(state = 'done') from _live_migration.indexes where name <> 'gated_index'"
        await services.until(others)

        # all are dead; the copy goes on when there is one again
        await services.until(f"{builder} and owner like '%-' || $1::int || '-%'", second.pid)
        for service in (first, second):
            service.send(signal.SIGKILL)
        last = await services.consumers(1)
        seconds = await taken_over(services, second)
        print(f"index of the last consumer taken over by a new one after {seconds:.1f} s")
        await open_gate(gate, 1, 7)
        assert await services.migrate.wait() == 0, services.migrate.log()
        assert await last[0].process.wait() == 0
    assert not differences(await read_rows(source_database, COPIED), await read_rows(target_database, COPIED))
    indexes = "select array_agg(indexdef order by indexdef) from pg_indexes where schemaname = 'public'"
    target = await asyncpg.connect(target_database)
    assert await target.fetchval(indexes) == await source.fetchval(indexes)
    await target.close()
    await source.close()


REPLAYED = ("gated_rows", "no_key", *(f"t{i}" for i in range(10)))
REPLAY_SCHEMA = f"""
    {GATES}
    create table gated_rows (id int primary key, n gated);
    create table no_key (a int, b text);
    alter table no_key replica identity full;
    do $$ begin
        for i in 0..9 loop execute format('create table t%s (id int primary key, v int)', i); end loop;
    end $$;
"""
OWNERS = "select count(distinct owner) = $1 and bool_and(owner is not null) from _live_migration.checkpoints"
NO_LANE_IS_HELD_BY = "select bool_and(owner is not null and not owner like any($1)) from _live_migration.checkpoints"
LANES_OF_OTHERS = "select array_agg(lane) from _live_migration.checkpoints where owner not like $1"
FEW_MOVES = 5
"""Of the hundred and more that a lane makes while the group waits for a dead member."""


class Writer:
    """Keeps every lane busy: each transaction touches each table, one without a key too, where a doubled row shows."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._write())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        if self._task:
            await self._task

    async def _write(self) -> None:
        connection = await asyncpg.connect(self._uri)
        number = 0
        try:
            while not self._stop.is_set():
                number += 1
                statements = [
                    f"insert into t{i} values ({number}, 0); update t{i} set v = v + 1 where id > {number - 3}"
                    for i in range(10)
                ]
                statements.append(f"insert into no_key values ({number % 7}, 'b')")
                if number % 3 == 0:
                    statements.append("delete from no_key where ctid = (select min(ctid) from no_key)")
                await connection.execute("; ".join(statements))
                await asyncio.sleep(0.05)
        finally:
            await connection.close()


async def test_replay_goes_on_whoever_dies_or_hangs(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(REPLAY_SCHEMA)
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    services = Services(cli, unique_name, tmp_path, partitions=6)
    async with gates(target_database, (1, 5)) as gate, services:
        consumers = await services.consumers(3)
        await services.migrate.until_phase("replay")
        await services.until(OWNERS, 3)
        async with Writer(source_database), LaneWatch(target_database) as watch:
            await services.until("select bool_and(change_count > 100) from _live_migration.checkpoints")

            # the consumer of a lane hangs in the middle of a transaction, and a new one joins at once
            await source.execute(
                "insert into gated_rows select i, i from generate_series(1, 50) i; insert into gated_rows values (51, -5)"
            )
            await services.until("select count(*) > 0 from pg_locks where not granted and classid = 1 and objid = 5")
            lane = await services.target.fetchval(
                "select lane from _live_migration.tables where table_name = 'gated_rows'"
            )
            lanes = await services.target.fetch("select lane, owner from _live_migration.checkpoints")
            owner = next(row["owner"] for row in lanes if row["lane"] == lane)
            stopped = next(c for c in consumers if f"-{c.pid}-" in owner)
            others = [c for c in consumers if c is not stopped]
            kept = [row["lane"] for row in lanes if row["owner"] != owner]
            watch.forget()
            stopped.send(signal.SIGSTOP)
            joined = await services.consumers(1)
            seconds = await services.seconds_until(NO_LANE_IS_HELD_BY, [stopped.owner])
            pauses, moves = watch.longest_pauses(), dict(watch.moves)
            print(
                f"lanes of a stopped consumer taken over after {seconds:.1f} s; longest pauses {pauses}, lanes of the others {kept}"
            )
            # the group waits that long for the stopped one; nobody else may
            assert min(moves.get(lane, 0) for lane in kept) >= FEW_MOVES
            assert max(pauses[lane] for lane in kept) < seconds / 2
            assert seconds < PROMISED_SECONDS
            await open_gate(gate, 1, 5)
            stopped.send(signal.SIGCONT)
            await services.until(OWNERS, 4)

            # one leaves in order
            kept = await services.target.fetchval(LANES_OF_OTHERS, others[0].owner)
            watch.forget()
            assert await others[0].terminate() == 0
            await services.until(NO_LANE_IS_HELD_BY, [others[0].owner])
            await services.until(OWNERS, 3)
            pauses = watch.longest_pauses()
            print(f"longest pauses while one leaves: {pauses}, lanes of the others {kept}")
            assert max(pauses[lane] for lane in kept) < SESSION_SECONDS / 2

            # one dies
            kept = await services.target.fetchval(LANES_OF_OTHERS, others[1].owner)
            watch.forget()
            others[1].send(signal.SIGKILL)
            seconds = await services.seconds_until(NO_LANE_IS_HELD_BY, [others[1].owner])
            pauses, moves = watch.longest_pauses(), dict(watch.moves)
            print(
                f"lanes of a killed consumer taken over after {seconds:.1f} s; longest pauses {pauses}, moves {moves}, lanes of the others {kept}"
            )
            assert seconds < PROMISED_SECONDS
            assert min(moves.get(lane, 0) for lane in kept) >= FEW_MOVES
            assert max(pauses[lane] for lane in kept) < SESSION_SECONDS / 2

            # all are dead; replay goes on when there is one again
            for consumer in (stopped, *joined):
                consumer.send(signal.SIGKILL)
            await services.consumers(1)
            seconds = await services.seconds_until(NO_LANE_IS_HELD_BY, [stopped.owner, joined[0].owner])
            print(f"lanes of all consumers taken over by a new one after {seconds:.1f} s")
            assert seconds < PROMISED_SECONDS
        code, _, err = await cli.run("cutover")
        assert code == 0, err
        assert await services.migrate.wait() == 0, services.migrate.log()
    assert not differences(await read_rows(source_database, REPLAYED), await read_rows(target_database, REPLAYED))
    await source.close()


async def test_all_consumers_of_one_migrate_die_at_once(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    workload = Workload(source_database, seed=4)
    await workload.create(rows=5_000)
    migrate = await cli.migrate("--consumers", "4", "--part-size", "65536", "--lease", "3")
    try:
        async with workload:
            for phase in ("copy", "replay"):
                await migrate.until_phase(phase, "replay")
                async with asyncio.timeout(30):
                    while len(consumers := migrate.children("consumer")) < 4:
                        await asyncio.sleep(0.05)
                for consumer in consumers:
                    consumer.kill()
            await migrate.until_phase("replay")
        code, _, err = await cli.run("cutover")
        assert code == 0, err
        assert await migrate.wait() == 0, migrate.log()
    finally:
        await migrate.close()
    assert not differences(await read_rows(source_database), await read_rows(target_database))
