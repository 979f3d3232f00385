"""What TimescaleDB says of itself on either side, read for `timescale_findings` to judge."""

from __future__ import annotations

import asyncpg

_VERSION_TO_BE = """
    select coalesce(
        (select extversion::text from pg_extension where extname = 'timescaledb'),
        (select version::text from pg_available_extension_versions where name = 'timescaledb' and version = $1),
        (select default_version::text from pg_available_extensions where name = 'timescaledb'))
"""


async def read_version_to_be(connection: asyncpg.Connection, wanted: str) -> str | None:
    """Give the version of TimescaleDB that a database has, or would get: `wanted` where the server offers it, else its default.

    None where the server has no TimescaleDB at all.
    """
    version: str | None = await connection.fetchval(_VERSION_TO_BE, wanted)
    return version
