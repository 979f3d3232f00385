"""Binary values shown as text: the server's own text is what they must say."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.readable import readable

pytestmark = pytest.mark.integration

VALUES = {
    (1700, "numeric"): [
        "0", "0.00", "1", "-1", "10000", "100000000", "0.1", "-0.0001", "0.00010000", "12345.678900", "1e-20", "-1e30",
        "9999.9999", "100000000.00000001", "123456789012345678901234567890.123456789", "NaN", "Infinity", "-Infinity",
    ],
    (1082, "date"): ["2000-01-01", "1999-12-31", "2026-02-28", "0001-01-01", "9999-12-31", "infinity", "-infinity"],
    (20, "int8"): ["0", "-9223372036854775808"],
    (701, "float8"): ["1.5", "0.1", "-1e+100"],
    (2950, "uuid"): ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
}  # fmt: skip


async def test_binary_values_read_as_the_server_writes_them(target_database: str) -> None:
    connection = await asyncpg.connect(target_database)
    for (type_oid, name), values in VALUES.items():
        send = f"{name}send" if name in ("int8", "float8") else f"{name}_send"
        for value in values:
            query = f"select {send}($1::text::{name}), $1::text::{name}::text"
            sent, text = await connection.fetchrow(query, value)
            assert readable(type_oid, sent) == text, (name, value)
    await connection.close()
