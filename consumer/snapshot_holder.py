"""Holding the snapshot that the parts of a big table share, until the last of them is done."""

from __future__ import annotations

from live_migration.common.errors import ConnectionLost, LiveMigrationError
from live_migration.common.telemetry import get_logger
from live_migration.consumer.claim_endings import finish_shared_table
from live_migration.consumer.claims import TableClaim
from live_migration.consumer.copy_context import IDLE_SECONDS, CopyContext
from live_migration.consumer.copy_errors import CopyDeferred, server_errors
from live_migration.consumer.lease_keeper import Lease
from live_migration.consumer.sessions import CopySession

log = get_logger(__name__)


async def hold_snapshot(context: CopyContext, lease: Lease[TableClaim], source: CopySession) -> None:
    """Keep `source`'s transaction open, with lock and snapshot, until the table's parts are done, then mark it copied.

    When the session is lost the table begins anew, with the next attempt. Closes `source`, drops `lease`.
    """
    try:
        with context.watch.watching(source.backend.pid, lease):
            await lease.interrupt.guard(_until_copied(context, lease, source))
    except LiveMigrationError as error:
        source.terminate()
        try:
            await context.set_back(lease, error)
        except ConnectionLost as lost:  # the lease is dropped: a keeper frees the table
            log.warning("table not given back", table=str(lease.claim), reason=lost.message)
    finally:
        source.terminate()
        context.keeper.drop(lease)


async def _until_copied(context: CopyContext, lease: Lease[TableClaim], source: CopySession) -> None:
    claim = lease.claim
    while True:
        with server_errors("source", f"holding the snapshot of {claim}"):
            await source.connection.execute(
                "select 1"
            )  # a session that is used is neither dropped by a firewall nor lost unseen
        try:
            async with context.control.use(f"looking at the parts of {claim}") as connection:
                lease.is_finishing = True
                is_copied = await finish_shared_table(connection, claim, context.owner)
                lease.is_finishing = is_copied
        except (
            ConnectionLost,
            CopyDeferred,
        ) as error:  # the snapshot outlives a target that is away, as long as the lease does
            lease.is_finishing = False
            log.debug("target away while a snapshot is held", table=str(claim), reason=error.message)
        else:
            if is_copied:
                log.info("table copied", table=str(claim), attempt=claim.attempt)
                context.bell.ring()
                return
        await context.bell.wait(IDLE_SECONDS)
