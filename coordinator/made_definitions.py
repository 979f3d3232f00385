"""What a target is given anew, where chunks cannot come over as they are: TimescaleDB of another version there, plain tables that become
hypertables, or hypertables that become plain tables. Read in the snapshot that the plan is of, and kept in the state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import asyncpg

from live_migration.common.errors import UsageError
from live_migration.common.postgres import asking
from live_migration.common.relation import QualifiedName
from live_migration.common.settings import Settings
from live_migration.common.timescale import parse_version, read_layout, read_slices, read_version, read_version_to_be
from live_migration.coordinator import archives, hypertable_definitions
from live_migration.coordinator.dump_script import PG_CLASS, PG_CONSTRAINT
from live_migration.coordinator.flat_entries import read_flat_entries
from live_migration.coordinator.hypertable_checks import skipped_oids
from live_migration.coordinator.hypertable_definitions import Definitions
from live_migration.coordinator.hypertable_entries import EntriesOfTimescale, read_entries_of_timescale
from live_migration.coordinator.hypertable_skips import read_skips
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.hypertable_spec import HypertableSpec, definition_of, read_specs
from live_migration.coordinator.hypertable_tables import Table, read_tables

ARCHIVE = "hypertables"
_SCHEMA = "public"
"""Where the extension is made for a source that has none."""


@dataclass(frozen=True, slots=True)
class Made:
    """What is made on the target. `entries`: which of the archive's are not run, or late.

    `slices`: of each chunk that the plan copies, by its oid on the source. `left_out`: oids of indexes and foreign keys that the
    target's tables cannot have, by the user's choice.
    `is_from_plain`: the tables are plain ones on the source. `is_flat`: they become plain ones on the target, and aggregates are left out.
    """

    definitions: Definitions
    entries: EntriesOfTimescale
    slices: dict[int, str] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()
    is_from_plain: bool = False
    is_flat: bool = False

    @property
    def absent(self) -> frozenset[QualifiedName]:
        """Names of the source's hypertables that the target does not get: those of aggregates, where it has plain tables alone."""
        return frozenset(self.materializations) if self.is_flat else frozenset()

    @property
    def roots(self) -> frozenset[QualifiedName]:
        """Names of the hypertables, the same on both ends, be they plain tables on either."""
        return frozenset(each.name for each in self.definitions.hypertables)

    @property
    def materializations(self) -> dict[QualifiedName, QualifiedName]:
        """Names of the aggregates by those of the hypertables that hold their rows on the source."""
        return {each.materialization: each.name for each in self.definitions.aggregates}

    def encode(self) -> bytes:
        found = {
            "definitions": hypertable_definitions.encode(self.definitions).decode(),
            "made": sorted(self.entries.made),
            "after_aggregates": sorted(self.entries.after_aggregates),
            "slices": list(self.slices.items()),
            "left_out": sorted(self.left_out),
            "is_from_plain": self.is_from_plain,
            "entries_left_out": sorted(self.entries.left_out),
            "is_flat": self.is_flat,
        }
        return json.dumps(found).encode()

    @classmethod
    def decode(cls, content: bytes) -> Made:
        found = json.loads(content)
        keys = ("made", "after_aggregates", "entries_left_out")
        entries = EntriesOfTimescale(*(frozenset((c, o) for c, o in found[key]) for key in keys))
        return cls(
            hypertable_definitions.decode(found["definitions"].encode()),
            entries,
            dict(found["slices"]),
            frozenset(found["left_out"]),
            found["is_from_plain"],
            found["is_flat"],
        )


async def read_made(settings: Settings, source: asyncpg.Connection, target: asyncpg.Connection) -> Made | None:
    """Give what is to be made on the target; None where everything comes over as it is. Call it in the planning snapshot.

    Raises:
        UsageError: hypertables are asked for that cannot be.
    """
    version = await read_version(source)
    if version is None:
        specs = read_specs(settings.hypertable, settings.hypertables_file)
        return await _of_specs(settings, specs, source, target) if specs else None
    if settings.flatten:
        return await _flat(source)
    with asking("target", "asking for TimescaleDB's version"):
        if await read_version_to_be(target, version) == version:
            return None
    definitions, layout = await read_definitions(source), await read_layout(source)
    assert definitions is not None
    assert layout is not None
    return Made(definitions, await read_entries_of_timescale(source), await read_slices(source, layout))


async def _flat(source: asyncpg.Connection) -> Made:
    definitions, found = await read_definitions(source), await read_flat_entries(source)
    assert definitions is not None
    return Made(definitions, found.entries, left_out=found.indexes, is_flat=True)


async def _of_specs(
    settings: Settings, specs: Sequence[HypertableSpec], source: asyncpg.Connection, target: asyncpg.Connection
) -> Made:
    with asking("target", "asking for TimescaleDB's version"):
        version = await read_version_to_be(target, "")
    if version is None:
        raise UsageError(
            "hypertables are asked for, and the target's server has no TimescaleDB", hint="Install it there."
        )
    tables = {table.name: table for table in await read_tables(source)}
    left_out = skipped_oids(specs, tuple(tables.values()), parse_version(version), read_skips(settings))
    definitions = Definitions(version, _SCHEMA, tuple(definition_of(spec, _types(spec, tables)) for spec in specs))
    keys = frozenset((catalog, oid) for oid in left_out for catalog in (PG_CLASS, PG_CONSTRAINT))
    return Made(definitions, EntriesOfTimescale(keys, frozenset()), left_out=left_out, is_from_plain=True)


def _types(spec: HypertableSpec, tables: dict[QualifiedName, Table]) -> dict[str, str]:
    table = tables.get(spec.name)
    types = {column.name: column.type for column in table.columns} if table else {}
    if lacking := [name for name in spec.partitioning_columns if name not in types]:
        raise UsageError(
            f"hypertable {spec.name}: the source has no such table with columns {', '.join(lacking)}",
            hint="Check --hypertable and --hypertables-file; `live-migration validate` checks them all.",
        )
    return types


async def load_made(target: asyncpg.Connection) -> Made | None:
    """Give what the state keeps of it; None where everything comes over as it is."""
    with asking("target", "reading the plan"):
        content = await archives.read(target, ARCHIVE)
    return Made.decode(content) if content else None
