"""Cutting tables into parts, and the pipe between the two servers."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from live_migration.common.relation import QualifiedName
from live_migration.consumer.copy_stream import SLICE_BYTES, BytePipe, CopyPlan
from live_migration.consumer.parts import BlockRange, plan_parts

BLOCK = 8192


def test_a_table_up_to_the_part_size_is_one_open_part() -> None:
    assert plan_parts(0, BLOCK, BLOCK) == (BlockRange(0, None, 0),)
    assert plan_parts(BLOCK, BLOCK, BLOCK) == (BlockRange(0, None, BLOCK),)


def test_parts_follow_one_another_and_the_last_is_open() -> None:
    parts = plan_parts(10 * BLOCK, 4 * BLOCK, BLOCK)
    assert [(part.first, part.end) for part in parts] == [(0, 3), (3, 6), (6, None)]
    assert [part.size_bytes for part in parts] == [3 * BLOCK, 3 * BLOCK, 4 * BLOCK]


@given(st.integers(0, 10**7), st.integers(1, 10**7), st.sampled_from([1024, 8192, 32768]))
def test_parts_hold_every_block_once(blocks: int, part_size: int, block_size: int) -> None:
    blocks %= 5000
    parts = plan_parts(blocks * block_size, part_size, block_size)
    assert parts[0].first == 0
    assert parts[-1].end is None
    for before, after in pairwise(parts):
        assert before.end == after.first
        assert before.first < after.first
    assert sum(part.size_bytes for part in parts) == blocks * block_size
    assert all(part.size_bytes <= max(part_size, block_size) + block_size for part in parts)


def test_the_query_of_a_part_names_only_its_table_and_blocks() -> None:
    plan = CopyPlan(QualifiedName("s", 't"'), ("a", 'b "c"'), True)
    assert plan.query(BlockRange(3, 6, 0)) == (
        'select "a", "b ""c""" from only "s"."t""" '
        "where ctid >= '(3,0)'::pg_catalog.tid and ctid < '(6,0)'::pg_catalog.tid"
    )
    assert plan.query(BlockRange(6, None, 0)).endswith("where ctid >= '(6,0)'::pg_catalog.tid")


async def test_the_pipe_is_bounded_in_bytes_and_passes_what_is_larger_alone() -> None:
    pipe = BytePipe(100)
    written: list[int] = []

    async def write() -> None:
        for size in (60, 60, 300_000, 10):
            await pipe.write(b"x" * size)
            written.append(size)
        pipe.close()

    writing = asyncio.ensure_future(write())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert written == [60]
    slices = [len(piece) async for piece in pipe.read()]
    await writing
    assert slices == [60, 60, SLICE_BYTES, 300_000 - SLICE_BYTES, 10]
    assert pipe.total_bytes == 300_130


async def test_a_pipe_that_is_not_closed_has_no_end() -> None:
    pipe = BytePipe(100)
    await pipe.write(b"half")
    reader = pipe.read()
    assert bytes(await anext(reader)) == b"half"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await anext(reader)
