"""Tables that would do well as hypertables, proposed on a terminal: one taken, one not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.e2e.test_cli import on_terminal, run
from tests.fixtures.fix_postgres import execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_TABLE = """
    create table {0} (time timestamptz not null, id int not null, picture text, primary key (id, time));
    alter table {0} alter picture set storage external;
    insert into {0} select '2026-01-01'::timestamptz + g * interval '5 minutes', g, repeat(md5(g::text), 131072)
        from generate_series(1, {1}) g;
    analyze {0};
"""
"""Of big rows, so that it is quickly larger than 1 GiB, from where on a table is proposed."""


async def test_proposed_tables_become_hypertables_where_the_user_says_so(
    source_database: str, target_of_timescale: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = source_database, target_of_timescale
    await execute(source, _TABLE.format("pictures", 300), _TABLE.format("others", 270), _TABLE.format("small", 3))
    kept = {name: value for name, value in os.environ.items() if name != "KAFKA" and "LIVE_MIGRATION_" not in name}
    ours = {"LIVE_MIGRATION_NAME": unique_name, "LIVE_MIGRATION_DIR": str(tmp_path / "data"), "TERM": "xterm"}
    environment = {**kept, **ours, "SOURCE": source, "TARGET": target, "COLUMNS": "200"}

    async with on_terminal(environment, "migrate", "--cutover", "auto") as screen:
        await screen.until("Make public.pictures:time,")
        assert "about 300 rows" in screen.shown
        screen.type("y\n")
        await screen.until("Make public.others:time,")
        screen.type("\n")
        assert await asyncio.wait_for(screen.process.wait(), 300) == 0, screen.shown
        assert "Make public.small" not in screen.shown
    names = "select array_agg(hypertable_name::text) from timescaledb_information.hypertables"
    assert await world.value(target, names) == ["pictures"]
    rows = "(select time, id, md5(picture) from {})"
    for table in ("pictures", "others", "small"):
        assert await world.all_rows(source, rows.format(table)) == await world.all_rows(target, rows.format(table))
    code, _, said = await run(environment, "clean", "--prune")
    assert code == 0, said
