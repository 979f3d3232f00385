"""What a server's error tells: whether it refuses a statement, or the session is over."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.postgres import refusal_of


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.AdminShutdownError("ending"),
        asyncpg.QueryCanceledError("told to"),
        asyncpg.ConnectionDoesNotExistError("gone"),
    ],
)
def test_a_session_that_ends_refuses_nothing(error: asyncpg.PostgresError) -> None:
    with pytest.raises(type(error)) as raised:
        refusal_of(error)
    assert raised.value is error


def test_a_refusal_is_told_with_its_detail() -> None:
    error = asyncpg.PostgresError.new({"C": "23514", "M": "no", "D": "row 7"})
    assert refusal_of(error) == "no (row 7)"
    assert refusal_of(asyncpg.UndefinedTableError("no such table")) == "no such table"
