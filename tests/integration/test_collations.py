"""Orders of text, as each version's catalog has them."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.collations import TextOrder, read_orders
from live_migration.common.relation import QualifiedName
from tests.fixtures.fix_postgres import PostgresFactory, execute

pytestmark = pytest.mark.integration

BYTES = QualifiedName("pg_catalog", "C")
OWN = QualifiedName("public", "own")
ABSENT = QualifiedName("public", "absent")


@pytest.mark.parametrize("version", [14, 15, 17, 18])
async def test_orders_are_read(postgres_server: PostgresFactory, unique_name: str, version: int) -> None:
    server = postgres_server(version)
    create = f"create database {unique_name} template template0 encoding 'UTF8' lc_collate 'C.UTF-8' lc_ctype 'C.UTF-8'"
    await execute(server.uri(), create)
    connection = await asyncpg.connect(server.uri(unique_name))
    try:
        await connection.execute("create collation own (provider = libc, locale = 'C.UTF-8')")
        orders = await read_orders(connection, [BYTES, OWN, ABSENT])
    finally:
        await connection.close()
        await execute(server.uri(), f"drop database {unique_name}")
    libc = TextOrder("c", "C.utf8")
    assert orders == {None: libc, OWN: libc, BYTES: TextOrder("bytes", "code points")}
