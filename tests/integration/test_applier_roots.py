"""Leaves of the source whose rows go into one root on the target, as those of a hypertable's chunks do."""

from __future__ import annotations

import random

import asyncpg
import pytest

from live_migration.consumer.applier import Applier
from tests.integration.test_applier import Pair, pair

__all__ = ["pair"]

pytestmark = pytest.mark.integration

COLUMNS = "at int not null, k text not null, n int, big text, primary key (at, k)"
PARTITIONED = f"create table root ({COLUMNS}) partition by range (at); alter table root alter big set storage external;"


def partitions(width: int) -> str:
    return "".join(
        f"create table p{at} partition of root for values from ({at}) to ({at + width});" for at in range(0, 100, width)
    )


async def _lead_to_root(pair: Pair) -> asyncpg.Connection:
    """Name the root as the table of each leaf, and part the target otherwise than the source."""
    target = await asyncpg.connect(pair.target_uri)
    await target.execute(f"""
        update _live_migration.tables set root_schema = 'public', root_name = 'root';
        drop table root; {PARTITIONED} {partitions(50)}""")
    return target


@pytest.mark.parametrize("batch", [1, 1_000_000], ids=["one by one", "at once"])
@pytest.mark.parametrize("binary", [False, True], ids=["text", "binary"])
async def test_rows_of_leaves_go_into_the_root_in_their_order(pair: Pair, batch: int, binary: bool) -> None:
    """Rows move between leaves that are one leaf on the target, and keys are used again by others."""
    rng = random.Random(f"{batch} {binary}")
    await pair.prepare(PARTITIONED + partitions(10))
    target = await _lead_to_root(pair)
    await pair.source.execute("insert into root select i, 'k', i, repeat('x', 4000) from generate_series(0, 99) i")
    for _ in range(60):
        at, other = rng.randrange(100), rng.randrange(100)
        change = rng.choice(
            (
                f"update root set n = n + 1 where at between {at} and {other}",
                f"update root set at = {other} where at = {at} and not exists (select from root where at = {other})",
                f"update root set k = k || 'x' where at = {at}",
                f"delete from root where at = {at}",
                f"insert into root values ({at}, 'k', 0, 'new') on conflict do nothing",
                f"delete from root where at = {at}; insert into root values ({at}, 'k', 1, 'again') on conflict do nothing",
            )
        )
        await pair.source.execute(change)
    await pair.replay(binary=binary, most_changes=batch, segments_per_batch=batch)
    rows = "select * from root order by at, k"
    assert await pair.source.fetch(rows) == await target.fetch(rows)
    await target.close()
    await pair.close()


async def test_changes_of_many_leaves_are_one_run(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch over many chunks costs the target one statement, not one a chunk."""
    runs: list[int] = []
    usual = Applier._apply_run
    monkeypatch.setattr(Applier, "_apply_run", lambda self, run: runs.append(run.count) or usual(self, run))
    await pair.prepare(PARTITIONED + partitions(10))
    target = await _lead_to_root(pair)
    await pair.source.execute("insert into root select i, 'k', i from generate_series(0, 99) i")
    await pair.source.execute("update root set n = 7")
    await pair.replay(binary=True, most_changes=1_000_000, segments_per_batch=1_000_000)
    assert runs == [200]
    assert await target.fetchval("select count(*) from root where n = 7") == 100
    await target.close()
    await pair.close()
