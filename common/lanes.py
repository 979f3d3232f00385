"""Which lane a table lies in. A lane is one partition of the change topic."""

from __future__ import annotations

from zlib import crc32

from live_migration.common.relation import QualifiedName


def lane_of(target_name: QualifiedName, lane_count: int) -> int:
    """Give the lane of a table, 0 to `lane_count` - 1, stable over processes and versions.

    The name is the table's on the target, so that all chunks of a hypertable meet in one lane.
    """
    return crc32(target_name.sql.encode()) % lane_count
