"""What `validate` says of hypertables that become plain tables (`--flatten`): what is not carried over, and what cannot be made. Pure."""

from __future__ import annotations

from live_migration.common.progress import format_bytes, name_list
from live_migration.coordinator.findings import Finding, error, warning
from live_migration.coordinator.flat_entries import FlatEntries
from live_migration.coordinator.hypertable_definitions import Definitions


def assess_flat(definitions: Definitions, entries: FlatEntries, decompressed_bytes: int) -> list[Finding]:
    """Name what a target of plain tables does not get. `decompressed_bytes`: what the source's compressed chunks take uncompressed."""
    found = []
    if entries.refused:
        found.append(
            error(
                f"tables of the source need TimescaleDB, which the target has not: {name_list(entries.refused)}",
                "Drop these defaults, constraints or columns on the source, or migrate to a TimescaleDB.",
            )
        )
    names = [each.name for each in definitions.hypertables]
    if names:
        found.append(
            warning(
                f"--flatten: hypertables become plain tables, without chunks, compression and policies: {name_list(names)}"
            )
        )
    if definitions.aggregates:
        found.append(
            warning(
                "--flatten: continuous aggregates are left out, with what they hold of data that are gone: "
                f"{name_list(each.name for each in definitions.aggregates)}",
                "Make materialized views of your own on the target after the cutover.",
            )
        )
    if entries.left_out:
        found.append(
            warning(
                f"--flatten: what needs TimescaleDB or a continuous aggregate is left out: {name_list(entries.left_out)}",
                "Make what you need of it on the target after the cutover, without TimescaleDB's functions.",
            )
        )
    if definitions.jobs:
        found.append(warning(f"--flatten: jobs are left out: {name_list(definitions.jobs)}"))
    if decompressed_bytes:
        found.append(
            warning(
                f"--flatten: compressed chunks take about {format_bytes(decompressed_bytes)} on the target, where nothing is compressed",
                "See that the target's disk has room for that.",
            )
        )
    return found
