"""pgbench's TPC-B-like transaction, its statements run by a procedure: hot rows, four tables."""

from __future__ import annotations

import asyncpg

from benchmarks.backlog import Backlog, measure_backlog
from benchmarks.cases.case import Case
from benchmarks.contestants.native import Native
from benchmarks.contestants.ours import Ours
from benchmarks.results import CaseResult, Plan

ABOUT = "backlog of 50,000 transactions of pgbench's TPC-B-like script, scale 10, four tables"
BRANCHES = 10

SCHEMA = """
    create table pgbench_branches (bid int primary key, bbalance int, filler char(88));
    create table pgbench_tellers (tid int primary key, bid int, tbalance int, filler char(84));
    create table pgbench_accounts (aid int primary key, bid int, abalance int, filler char(84));
    create table pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22))"""
_FILL = """
    insert into pgbench_branches select i, 0 from generate_series(1, {b}) i;
    insert into pgbench_tellers select i, (i - 1) / 10 + 1, 0 from generate_series(1, 10 * {b}) i;
    insert into pgbench_accounts select i, (i - 1) / 100000 + 1, 0, '' from generate_series(1, {a}) i"""
_LOADER = """
    create procedure load(count int, accounts int, branches int) language plpgsql as $$
    declare
        a int; b int; t int; d int;
    begin
        for i in 1 .. count loop
            a := random(1, accounts); b := random(1, branches); t := random(1, 10 * branches); d := random(-5000, 5000);
            update pgbench_accounts set abalance = abalance + d where aid = a;
            perform abalance from pgbench_accounts where aid = a;
            update pgbench_tellers set tbalance = tbalance + d where tid = t;
            update pgbench_branches set bbalance = bbalance + d where bid = b;
            insert into pgbench_history (tid, bid, aid, delta, mtime) values (t, b, a, d, clock_timestamp());
            commit;
        end loop;
    end $$"""
# A last transaction leaves the round's number in each table; the table without an index is looked at last.
_LAST = """
    update pgbench_accounts set filler = '{n}' where aid = 1;
    update pgbench_tellers set filler = '{n}' where tid = 1;
    update pgbench_branches set filler = '{n}' where bid = 1;
    insert into pgbench_history (delta, filler) values (0, '{n}')"""
_APPLIED = """
    select case when
        exists (select from pgbench_accounts where aid = 1 and filler = '{n}') and
        exists (select from pgbench_tellers where tid = 1 and filler = '{n}') and
        exists (select from pgbench_branches where bid = 1 and filler = '{n}')
    then exists (select from pgbench_history where filler = '{n}') else false end"""


async def run(plan: Plan) -> CaseResult:
    count, accounts = plan.scaled(50_000), plan.scaled(BRANCHES * 100_000)

    async def load(connection: asyncpg.Connection, number: int) -> int:
        await connection.execute("set synchronous_commit = off")  # of the loading session alone
        await connection.execute(f"select setseed(0.{number})")
        await connection.execute(f"call load({count}, {accounts}, {BRANCHES})")
        await connection.execute(_LAST.format(n=number))
        return 4 * count

    backlog = Backlog(
        tables=tuple(f"public.pgbench_{name}" for name in ("branches", "tellers", "accounts", "history")),
        schema=SCHEMA,
        initial=(_FILL.format(a=accounts, b=BRANCHES), _LOADER),
        load=load,
        applied=lambda number: _APPLIED.format(n=number),
    )
    return await measure_backlog("tpcb", ABOUT, plan, backlog, [Ours(), Native(binary=True)])


CASE = Case("tpcb", ABOUT, run, aim=1.2)
