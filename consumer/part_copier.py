"""Copying: a worker claims parts and tables, biggest first, and streams them from source to target."""

from __future__ import annotations

from live_migration.common.chunk_range import is_same_range
from live_migration.common.errors import LiveMigrationError
from live_migration.common.state import record_event
from live_migration.common.telemetry import get_logger
from live_migration.consumer.batch_bytes import why_not_as_they_are
from live_migration.consumer.chunk_copy import (
    CHANGED,
    as_it_is_now,
    copy_compressed,
    in_range_now,
    is_as_planned,
    look_without,
)
from live_migration.consumer.claim_endings import CopyOrigin, finish_part, finish_table, share_snapshot
from live_migration.consumer.claims import PartClaim, TableClaim, claim_group, claim_part, claim_table
from live_migration.consumer.committing import await_applied
from live_migration.consumer.copy_context import CopyContext
from live_migration.consumer.copy_errors import CopyDeferred, server_errors
from live_migration.consumer.copy_stream import CopyCount, stream_copy
from live_migration.consumer.copy_transactions import begin_on_target, end_on_source
from live_migration.consumer.lease_keeper import Lease
from live_migration.consumer.merged_chunks import (
    Leftover,
    absorb,
    find_newcomers,
    look_for_merged,
    mark_leftover,
    mark_newcomers,
    siblings,
)
from live_migration.consumer.sessions import CopySession, SessionPair
from live_migration.consumer.snapshot_holder import hold_snapshot
from live_migration.consumer.table_group import copy_group_or_set_back
from live_migration.consumer.table_snapshot import (
    check_target,
    end_earlier_parts,
    import_snapshot,
    lock_table,
    require_known_timeline,
)

_AWAIT_CHUNK = "set local lock_timeout = '1h'"
"""A transaction that makes a chunk lets no other make one of the same hypertable before it ends: other parts of ours wait for it."""

log = get_logger(__name__)


class CopyWorker:
    """Copies one part at a time, on a session of its own on either side."""

    def __init__(self, context: CopyContext) -> None:
        self._context = context
        self._pair = SessionPair(context.settings.source_uri(), context.settings.target_uri(), context.migration)

    async def run(self) -> None:
        """Copy until the phase is over; servers that are away are waited for.

        Raises:
            LiveMigrationError: what no retry mends.
        """
        await self._context.work(self._pair, self._work_once)

    async def _work_once(self) -> bool:
        """Copy what comes next, and tell whether there was anything."""
        source, target = await self._pair.open("source"), await self._pair.open("target")
        who = self._context.claimant(target, source)
        with server_errors("target", "claiming work"):
            part = await self._context.keeper.claim(claim_part(target.connection, who))
        if part is not None:
            return await self._copy_part_or_set_back(part, source, target)
        with server_errors("target", "claiming work"):
            part_size = self._context.settings.part_size
            group = await self._context.keeper.claim_group(claim_group(target.connection, who, part_size))
        if group:
            await copy_group_or_set_back(self._context, group, self._pair, source, target)
            return True
        with server_errors("target", "claiming work"):
            table = await self._context.keeper.claim(claim_table(target.connection, who))
        if table is not None:
            await self._copy_table_or_set_back(table, source, target)
        return table is not None

    async def _copy_part_or_set_back(self, lease: Lease[PartClaim], source: CopySession, target: CopySession) -> bool:
        """Copy a part, and tell whether that went well: if not, a pause is in place, as the part can be claimed at once."""
        try:
            with self._context.watch.watching(source.backend.pid, lease):
                await lease.interrupt.guard(self._copy_part(lease, source, target))
        except LiveMigrationError as error:
            self._pair.discard()
            await self._context.set_back(lease, error, target)
            return False
        finally:
            self._context.keeper.drop(lease)
        return True

    async def _copy_table_or_set_back(self, lease: Lease[TableClaim], source: CopySession, target: CopySession) -> None:
        is_shared = False
        try:
            with self._context.watch.watching(source.backend.pid, lease):
                is_shared = await lease.interrupt.guard(self._copy_table(lease, source, target))
            if is_shared:
                holder = self._pair.give_away("source")
                self._context.workers.create_task(hold_snapshot(self._context, lease, holder))
        except LiveMigrationError as error:
            self._pair.discard()
            await self._context.set_back(lease, error, target)
        finally:
            if not is_shared:
                self._context.keeper.drop(lease)

    async def _copy_part(self, lease: Lease[PartClaim], source: CopySession, target: CopySession) -> None:
        claim = lease.claim
        await import_snapshot(source.connection, claim, self._context.settings.lock_timeout)
        await begin_on_target(target, str(claim), *([_AWAIT_CHUNK] if claim.plan.target is not None else []))
        count = await stream_copy(
            source.connection,
            target.connection,
            claim.plan,
            blocks=claim.blocks,
            freeze=False,
            on_bytes=lease.progress,
        )
        await end_on_source(source, str(claim))
        lease.is_finishing = True
        with server_errors("target", f"finishing {claim}"):
            await finish_part(target.connection, claim, self._context.owner, count)
            await target.connection.execute("commit")
        log.info("part copied", table=str(claim.name), part=claim.part, rows=count.rows, bytes=count.bytes)
        self._context.bell.ring()

    async def _copy_table(self, lease: Lease[TableClaim], source: CopySession, target: CopySession) -> bool:
        """Copy a small table, or hand out the parts of a big one: True then, and `source` holds its snapshot."""
        claim = lease.claim
        settings = self._context.settings
        if claim.has_parts:
            await end_earlier_parts(target.connection, claim)
        if claim.is_chunk and claim.root is not None:
            claim = await as_it_is_now(source.connection, target.connection, claim)
        if claim.is_chunk and not await self._is_chunk_whole(claim, source, target):
            return False
        if not claim.is_chunk and await self._is_gone(claim, source):
            await self._end_without_rows(claim, source, target)
            return False
        with server_errors("source", f"looking at {claim}"):
            await await_applied(source.connection, target.connection, str(claim))
        table = await lock_table(source.connection, claim, settings.lock_timeout)
        if claim.is_chunk and not await is_as_planned(source.connection, claim):
            raise CopyDeferred(f"chunk {claim} is being compressed or decompressed just now")
        if claim.is_chunk and claim.root is not None:
            claim = await in_range_now(source.connection, claim)
        await require_known_timeline(target.connection, table.name, table.timeline)
        decompresses = claim.root is not None and claim.compressed is not None
        plan, origin = await check_target(target.connection, table, claim.root, decompresses=decompresses)
        await self._context.watch.flush_barrier()
        ranges = table.parts(settings.part_size)
        has_grown = lease.claim.range is not None and not is_same_range(claim.range, lease.claim.range)
        present = await siblings(source.connection, claim.oid) if has_grown else []
        newcomers = (
            await find_newcomers(source.connection, target.connection, claim.oid, lease.claim.range)
            if has_grown
            else {}
        )
        await begin_on_target(target, str(claim), *_empty(claim, has_grown=has_grown))
        if has_grown:
            assert origin.horizon is not None
            await mark_newcomers(target.connection, newcomers, origin.horizon)
            await absorb(target.connection, claim.oid, claim.range or "true", present, origin)
        if claim.compressed is not None and not decompresses:
            await copy_compressed(source.connection, target.connection, claim, lease.progress)
        if len(ranges) > 1 and not decompresses and not claim.is_into_plain:
            with server_errors("source", f"exporting the snapshot of {claim}"):
                snapshot_id = await source.connection.fetchval("select pg_export_snapshot()")
            with server_errors("target", f"planning the parts of {claim}"):
                await share_snapshot(target.connection, claim, self._context.owner, origin, snapshot_id, ranges)
                await target.connection.execute("commit")
            log.info("table is copied in parts", table=str(claim), parts=len(ranges), attempt=claim.attempt)
            self._context.bell.ring()
            return True
        count = await stream_copy(
            source.connection,
            target.connection,
            plan,
            blocks=None,
            freeze=claim.root is None,
            on_bytes=lease.progress,
        )
        await end_on_source(source, str(claim))
        lease.is_finishing = True
        with server_errors("target", f"finishing {claim}"):
            await finish_table(target.connection, claim, self._context.owner, origin, count)
            await target.connection.execute("commit")
        log.info("table copied", table=str(claim), rows=count.rows, bytes=count.bytes, attempt=claim.attempt)
        self._context.bell.ring()
        return False

    async def _is_chunk_whole(self, claim: TableClaim, source: CopySession, target: CopySession) -> bool:
        """Tell whether a chunk can be copied as it was planned; end its copy without rows where it cannot."""
        leftover = Leftover()
        if await self._is_gone(claim, source):
            origin = await look_without(source.connection, claim)
            lock_timeout = self._context.settings.lock_timeout
            leftover = await look_for_merged(source.connection, target.connection, claim.oid, lock_timeout)
            log.info("chunk was dropped on the source", table=str(claim))
        else:
            reason = await _why_not_as_planned(claim, source, target)
            if reason is None:
                return True
            origin = CopyOrigin(None, None, None, "[]", False, rebuild=reason)
            log.info("chunk is copied by its lane", table=str(claim), reason=reason)
        # What an earlier attempt brought goes, but for what the chunk was merged into: its copy has emptied the range.
        keeps = claim.root is not None and (leftover.has_rows or claim.attempt == 1)
        await begin_on_target(target, str(claim), *([] if keeps else _empty(claim)))
        with server_errors("target", f"finishing {claim}"):
            await mark_leftover(target.connection, leftover)
            await finish_table(target.connection, claim, self._context.owner, origin, CopyCount(0, 0))
            await target.connection.execute("commit")
        self._context.bell.ring()
        return False

    async def _end_without_rows(self, claim: TableClaim, source: CopySession, target: CopySession) -> None:
        """End the copy of a table that was dropped on the source: the target's is empty, and its lane passes over all that the stream holds of it."""
        origin = await look_without(source.connection, claim)
        await begin_on_target(target, str(claim), *_empty(claim))
        with server_errors("target", f"finishing {claim}"):
            await finish_table(target.connection, claim, self._context.owner, origin, CopyCount(0, 0))
            message = f"{claim} was dropped on the source before it was copied: it stays empty on the target"
            await record_event(target.connection, "warning", message)
            await target.connection.execute("commit")
        log.warning("table was dropped on the source", table=str(claim))
        self._context.bell.ring()

    async def _is_gone(self, claim: TableClaim, source: CopySession) -> bool:
        with server_errors("source", f"looking at {claim}"):
            return not await source.connection.fetchval(
                "select exists (select from pg_class where oid = $1)", claim.oid
            )


async def _why_not_as_planned(claim: TableClaim, source: CopySession, target: CopySession) -> str | None:
    if not await is_as_planned(source.connection, claim):
        return CHANGED
    return await why_not_as_they_are(source.connection, target.connection, claim)


def _empty(claim: TableClaim, *, has_grown: bool = False) -> list[str]:
    """Give the statements that remove what an earlier attempt left, and what a chunk has taken up that was copied before."""
    if claim.root is None:
        also = f", only {claim.compressed[0]}" if claim.compressed else ""
        return [f"truncate only {claim.name.sql}{also}"]
    if not claim.is_chunk:
        return [f"truncate {claim.root.sql}", _AWAIT_CHUNK]
    if claim.is_into_plain and not has_grown:
        return []  # copied in one transaction: no attempt leaves anything, and without an index the range is dear to look for
    # What an earlier attempt wrote is committed by now, or never will be: a claim is taken over only then.
    return [f"delete from {claim.root.sql} where {claim.range or 'false'}", _AWAIT_CHUNK]
