"""Tables without replica identity in which a row stands in the way: their changes are passed over until the copy at the cutover.

The stream did not tell that the row is gone, or changed, on the source. Such a table is copied once more at the cutover anyway.
"""

from __future__ import annotations

import asyncpg

from live_migration.common import state
from live_migration.consumer.refusal import ChangeRefused

# A chunk's lane copies it early instead.
_PASS_OVER = """
    update _live_migration.tables
    set copy_again = true, is_passed_over = true, error = $2,
        hint = 'Its changes are passed over from here on. It is copied again at the cutover; keep that in mind if it is big.'
    where oid = $1 and kind = 'table' and publication = 'insert' and not (copy_again and is_passed_over)
"""


async def pass_over(target: asyncpg.Connection, refused: ChangeRefused) -> bool:
    """Have a table copied once more, and its changes passed over until then; False where its changes are followed, or are passed over already."""
    if refused.obstructed is None:
        return False
    async with target.transaction():
        message = (
            f"{refused.relation} has no replica identity, and a row stands in the way of a newer one: {refused.message}"
        )
        if await target.execute(_PASS_OVER, refused.obstructed, message) != "UPDATE 1":
            return False
        await state.record_event(target, "warning", f"{message}; the table is copied once more at the cutover")
    return True
