"""What a failed chaos round keeps of its databases."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from tests.chaos.state import keep_state

pytestmark = pytest.mark.integration


async def test_the_state_is_kept_as_files(source_database: str, target_database: str, tmp_path: Path) -> None:
    connection = await asyncpg.connect(target_database)
    await connection.execute(
        "create schema _live_migration; create table _live_migration.checkpoints (lane int, error text);"
        "insert into _live_migration.checkpoints values (3, 'a row, and a \"quote\"')"
    )
    await connection.close()
    connection = await asyncpg.connect(source_database)
    await connection.execute("create table t (id int); create publication told for table t")
    await connection.close()
    await keep_state(source_database, target_database, tmp_path / "state")
    kept = {file.name: file.read_text() for file in (tmp_path / "state").iterdir()}
    assert kept["target-checkpoints.csv"] == ('lane,error\n3,"a row, and a ""quote"""\n')
    assert "told,public,t" in kept["source-published_tables.csv"]
    assert {"source-slots.csv", "source-statistics.csv", "target-sessions.csv"} <= kept.keys()


async def test_a_database_that_is_gone_is_said_to_be(source_database: str, tmp_path: Path) -> None:
    await keep_state(source_database, f"{source_database}_gone", tmp_path)
    assert "does not exist" in (tmp_path / "target-unreadable.txt").read_text()
    assert (tmp_path / "source-slots.csv").exists()
