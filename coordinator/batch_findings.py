"""Compressed chunks whose bytes do not mean the same on the target: named before the start, for they are copied as rows."""

from __future__ import annotations

import asyncpg

from live_migration.common.batch_order import find_other_orders, read_text_bounds
from live_migration.common.hashing import read_hashed
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import Layout, read_layout
from live_migration.coordinator.findings import Finding, warning

_COST = (
    "their chunks are copied as rows, one after another, before their changes are applied, and compressed on the target after the hand-over: until "
    "then they take their uncompressed size there"
)


async def find_batches(source: asyncpg.Connection, target: asyncpg.Connection) -> list[Finding]:
    """Name hypertables of which that is so, where both ends have one version. The consumers look at each chunk by themselves."""
    async with source.transaction(isolation="repeatable_read", readonly=True):
        layout = await read_layout(source)
        if layout is None or not layout.compressed:
            return []
        bounds = await read_text_bounds(source, layout.compressed)
        compressed_hypertables = {layout.chunks[each].hypertable for each in layout.compressed.values()}
        hashed = await read_hashed(source, compressed_hypertables)
        others = await find_other_orders(source, target, {each for wanted in bounds.values() for each in wanted})
    ordered = {layout.chunks[layout.compressed[each]].hypertable for each, wanted in bounds.items() if wanted & others}
    referring = {hypertable for (hypertable, _), each in hashed.items() if each.has_references}
    return assess_batches(_names(layout, ordered), _names(layout, referring))


def assess_batches(ordered: list[str], referring: list[str]) -> list[Finding]:
    """Judge hypertables with compressed batches in another order of text than the target's, and those with oids in batches. Pure."""
    found = []
    if ordered:
        found.append(
            warning(
                f"compressed rows are kept in an order of text (or by their least and greatest values in it) that is another on the target: "
                f"{name_list(ordered)}; {_COST}",
                "For these chunks to come over as they are, the target's database needs the source's locale, encoding and collation version: "
                "the same locale provider and version of its library (glibc, ICU).",
            )
        )
    if referring:
        found.append(
            warning(
                f"compressed rows hold oids as of regclass, which are others on the target: {name_list(referring)}; {_COST}"
            )
        )
    return found


def _names(layout: Layout, hypertables: set[int]) -> list[str]:
    found: list[QualifiedName] = [
        layout.hypertables[each].view or layout.hypertables[each].name for each in hypertables
    ]
    return sorted(str(each) for each in found)
