"""Whether a chunk's compressed rows mean the same on the target: else the chunk is copied as rows, and compressed there.

Least and greatest values of batches hold under the source's order of text; and values that are oids of the catalog's rows, as of regclass,
lie in compressed data as numbers.
"""

from __future__ import annotations

import asyncpg

from live_migration.common.batch_order import find_other_orders, read_text_bounds
from live_migration.common.hashing import read_hashed
from live_migration.consumer.claims import TableClaim
from live_migration.consumer.copy_errors import server_errors

OTHER_ORDER = "its compressed rows are in an order of text that is another on the target"
REFERENCES = "its compressed rows hold oids, as of regclass, which are others on the target"


async def why_not_as_they_are(source: asyncpg.Connection, target: asyncpg.Connection, claim: TableClaim) -> str | None:
    """Say why a chunk's compressed rows cannot come over as they are; None where they can, or there are none."""
    if claim.compressed is None or claim.root is not None:
        return None
    with server_errors("source", f"looking at {claim.name}"):
        if any(each.has_references for each in (await read_hashed(source, [claim.oid])).values()):
            return REFERENCES
        wanted = (await read_text_bounds(source, [claim.compressed[1]])).get(claim.compressed[1], set())
    if not wanted:
        return None
    with server_errors("target", f"looking at {claim.name}"):  # an error of the source's is told by its text
        return OTHER_ORDER if await find_other_orders(source, target, wanted) else None
