"""A row that the target refuses, as its user meets it: shown, skipped by the printed command, named at the end, kept."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.kafka import admin, topic_exists
from live_migration.common.settings import load_settings
from tests.e2e.processes import Cli

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SCHEMA = """
    create schema shop;
    create table shop.orders (id integer primary key, amount integer, note text);
    create table shop.log (at timestamptz, message text);
    insert into shop.orders select n, n, 'note ' || n from generate_series(1, 1000) n;
"""


async def until(connection: asyncpg.Connection, query: str, *, log: object = None, seconds: float = 90) -> object:
    try:
        async with asyncio.timeout(seconds):
            while not (found := await connection.fetchval(query)):
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s: {query}") from None
    return found


async def test_a_refused_row_is_shown_skipped_and_named_to_the_end(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    migrate = await cli.migrate("--consumers", "1", "--partitions", "4")
    try:
        await migrate.until_phase("replay")
        target = await asyncpg.connect(target_database)
        await target.execute("alter table shop.orders add check (amount < 10000)")
        await source.execute(
            "begin; insert into shop.orders values (2001, 1, 'a'), (2002, 99999, 'big'), (2003, 3, 'c'); commit"
        )
        await source.execute("insert into shop.log select now(), 'entry ' || n from generate_series(1, 100) n")
        await until(target, "select refused is not null from _live_migration.checkpoints where refused is not null")
        await until(target, "select count(*) = 100 from shop.log")  # another lane, which goes on

        _, out, _ = await cli.run("status", "--json")
        (trouble,) = json.loads(out)["troubles"]
        assert re.search(
            r"shop\.orders: the target refuses the INSERT .*key \(id=2002\).*SQLSTATE 23514", trouble["error"]
        )
        command = shlex.split(re.search(r"live-migration (skip .*)$", trouble["hint"])[1])  # type: ignore[index]
        assert command[-1] in trouble["error"]

        code, _, said = await cli.run(*command[:-1], command[-1] + "0")
        assert (code, f"does not stand at {command[-1]}0 but at {command[-1]}," in said) == (1, True), said
        code, _, said = await cli.run(*command)
        assert (code, "will skip the INSERT of shop.orders" in said) == (0, True), said
        await until(target, "select count(*) = 1 from _live_migration.skips where skipped_at is not null")

        await source.execute("update shop.orders set note = 'changed' where id < 500")
        _, out, _ = await cli.run("status", "--json")
        status = json.loads(out)
        assert status["troubles"] == []
        assert [(s["relation"], s["position"], s["state"]) for s in status["skips"]] == [
            ("shop.orders", command[-1], "skipped")
        ]
        named = f"skipped: INSERT of shop.orders at {command[-1]} in lane "
        _, _, said = await cli.run("status")
        assert "1 change skipped on request, which the target lacks: shop.orders 1;" in said
        assert named in said
        code, _, said = await cli.run("cutover")
        assert (code, named in said) == (0, True), said
        assert await migrate.wait() == 0, migrate.log()
        assert named in migrate.log()

        code, out, said = await cli.run("verify", "--json")
        report = json.loads(out)
        assert (code, [r["name"] for r in report["results"] if r["verdict"] != "equal"]) == (1, ["shop.orders"])
        assert report["skips"][0]["position"] == command[-1]
        assert named in said
        missing = await source.fetch("select id from shop.orders")
        there = await target.fetch("select id from shop.orders")
        assert {row["id"] for row in missing} - {row["id"] for row in there} == {2002}

        settings = load_settings({"kafka": kafka_bootstrap, "name": unique_name})
        code, _, said = await cli.run("clean", "--name", unique_name, "--dir", str(tmp_path / "data"))
        assert (code, f"left topic {unique_name}.dead-letter" in said) == (0, True), said
        _, out, _ = await cli.run("tail", "--dead-letters", "--name", unique_name)
        letter = json.loads(out)
        assert (letter["position"], letter["new"]) == (command[-1], {"id": "2002", "amount": "99999", "note": "big"})
        code, _, said = await cli.run("clean", "--prune", "--name", unique_name, "--dir", str(tmp_path / "data"))
        assert (code, f"deleted topic {unique_name}.dead-letter" in said) == (0, True), said
        async with admin(settings) as client:
            assert not await topic_exists(client, settings.dead_letter_topic)
        await target.close()
    finally:
        await migrate.close()
        await source.close()
