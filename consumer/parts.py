"""Cutting a table into parts: ranges of heap blocks, each copied in a transaction of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Heap blocks from `first` up to `end`, which is not in it; `end` None: to the table's end, wherever that is by then.

    `size_bytes` is what the range held when it was planned.
    """

    first: int
    end: int | None
    size_bytes: int

    @property
    def condition(self) -> str:
        """The range as a condition on `ctid`, which the server answers by a TID range scan."""
        lower = f"ctid >= '({self.first},0)'::pg_catalog.tid"
        return lower if self.end is None else f"{lower} and ctid < '({self.end},0)'::pg_catalog.tid"


def plan_parts(size_bytes: int, part_size: int, block_size: int) -> tuple[BlockRange, ...]:
    """Cut a heap of `size_bytes` into ranges of at most about `part_size`, of nearly the same size each.

    Together they hold every block there is: the first begins at 0, and the last has no end, as the table grows while
    it is copied.
    """
    block_count = -(-size_bytes // block_size)
    part_count = max(1, min(block_count, -(-size_bytes // part_size)))
    bounds = [block_count * i // part_count for i in range(part_count + 1)]
    return tuple(
        BlockRange(
            bounds[i],
            bounds[i + 1] if i + 1 < part_count else None,
            min(bounds[i + 1] * block_size, size_bytes) - bounds[i] * block_size,
        )
        for i in range(part_count)
    )
