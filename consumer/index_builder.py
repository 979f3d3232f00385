"""Building a copied table's indexes and constraints on the target."""

from __future__ import annotations

from collections.abc import Sequence

from live_migration.common.errors import Fenced, LiveMigrationError, Retry
from live_migration.common.postgres import set_lock_timeout
from live_migration.common.relation import quote_literal
from live_migration.common.state import record_event
from live_migration.common.telemetry import get_logger
from live_migration.consumer.claim_endings import finish_index, give_index_back
from live_migration.consumer.claims import IndexClaim, claim_index
from live_migration.consumer.copy_context import CopyContext
from live_migration.consumer.copy_errors import CopyEnded, TableStopped, server_errors
from live_migration.consumer.current_index import is_as_planned, read_now
from live_migration.consumer.lease_keeper import Lease
from live_migration.consumer.sessions import CopySession, SessionPair

ERROR_RETRY_SECONDS = 10.0
"""How often an index that could not be made is tried again: somebody may have mended the rows."""

_TABLE = "select to_regclass($1)::oid"
"""Which the source has where it is the one that was planned: another database tells nothing of an index."""

log = get_logger(__name__)


class IndexBuilder:
    """Builds one index at a time, on a session of its own."""

    def __init__(self, context: CopyContext) -> None:
        self._context = context
        self._pair = SessionPair(context.settings.source_uri(), context.settings.target_uri(), context.migration)

    async def run(self) -> None:
        """Build until the phase is over; a target that is away is waited for.

        Raises:
            LiveMigrationError: what no retry mends.
        """
        await self._context.work(self._pair, self._work_once)

    async def _work_once(self) -> bool:
        target = await self._pair.open("target")
        who = self._context.claimant(target, None)
        with server_errors("target", "claiming an index"):
            lease = await self._context.keeper.claim(claim_index(target.connection, who))
        if lease is None:
            return False
        try:
            await lease.interrupt.guard(self._build(lease, target))
        except LiveMigrationError as error:
            self._pair.discard()
            await self._set_back(lease, error)
        finally:
            self._context.keeper.drop(lease)
        return True

    async def _build(self, lease: Lease[IndexClaim], target: CopySession) -> None:
        claim, said = lease.claim, None
        try:
            await self._make(target, claim, claim.statements)
        except TableStopped as refusal:
            with server_errors("target", f"building {claim}"):
                await target.connection.execute("rollback")
            said = await self._make_as_it_is_now(target, claim, refusal)
        lease.is_finishing = True
        with server_errors("target", f"finishing {claim}"):
            if said:
                await record_event(target.connection, "warning", said)
            await finish_index(target.connection, claim, self._context.owner)
            await target.connection.execute("commit")
        log.info("index built", index=claim.name, table=str(claim.table))
        self._context.bell.ring()

    async def _make(self, target: CopySession, claim: IndexClaim, statements: Sequence[str]) -> None:
        memory = quote_literal(self._context.settings.maintenance_work_mem)
        with server_errors("target", f"building {claim}"):
            await target.connection.execute(
                f"begin; set local synchronous_commit = off; set local maintenance_work_mem = {memory}"
            )
            for statement in statements:
                await target.connection.execute(statement)

    async def _make_as_it_is_now(self, target: CopySession, claim: IndexClaim, refusal: TableStopped) -> str:
        """Make what the target refused as the source has it by now, and give what is said of it; nothing of one that is gone.

        Raises:
            TableStopped: it is as it was, or how it is cannot be told; or the target refuses that, too.
        """
        try:
            now = await self._look_at_source(claim)
        except LiveMigrationError:
            raise refusal from None
        if now is None:
            await self._make(target, claim, ())
            return f"{claim} is left out, which the source has no more: {refusal.message}"
        if is_as_planned(now, claim.statements):
            raise refusal
        await self._make(target, claim, now)
        return f"{claim} is built as the source has it by now: {now[0]}"

    async def _look_at_source(self, claim: IndexClaim) -> tuple[str, ...] | None:
        source = await self._pair.open("source")
        with server_errors("source", f"looking at {claim}"):
            async with source.connection.transaction(readonly=True):
                await source.connection.execute(set_lock_timeout(self._context.settings.lock_timeout))
                if await source.connection.fetchval(_TABLE, claim.table.sql) != claim.table_oid:
                    raise TableStopped(f"the source has no table {claim.table}")
                return await read_now(source.connection, claim.oid, claim.table.schema, claim.name, claim.statements)

    async def _set_back(self, lease: Lease[IndexClaim], error: LiveMigrationError) -> None:
        if error.retry is Retry.STOP and not isinstance(error, Fenced):
            raise error
        log.warning("index not built", index=lease.claim.name, table=str(lease.claim.table), reason=error.message)
        if isinstance(error, Fenced):
            return
        delay, message = 1.0, None
        if isinstance(error, CopyEnded):
            delay = 0.0
        elif isinstance(error, TableStopped):
            delay, message = ERROR_RETRY_SECONDS, str(error)
        async with self._context.control.use(f"giving {lease.claim} back") as connection:
            await give_index_back(connection, lease.claim, self._context.owner, delay, message)
