"""What is dropped on the target when a newcomer leaves: the table that was made for it, and no other."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common import state
from live_migration.coordinator.newcomer_leaving import _drop

pytestmark = pytest.mark.integration

_ROW = """
    insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, newcomer, made_oid)
    values (4711, 'public', 'late', 0, 'all', '[]', true, 'ready', 'made', 'public.late'::regclass)
"""


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_a_table_that_somebody_else_made_under_a_newcomers_name_is_left(
    target_database: str, is_replaced: bool
) -> None:
    target = await asyncpg.connect(target_database)
    await state.create_schema(target)
    await target.execute("create table late (id int)")
    await target.execute(_ROW)
    if is_replaced:
        await target.execute("drop table late; create table late (theirs text)")
    async with target.transaction():
        await _drop(target, 4711)
    assert await target.fetchval("select to_regclass('public.late') is not null") is is_replaced
    await target.close()
