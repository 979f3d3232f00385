"""Which lane a table lies in, or which lanes: a lane is one partition of the change topic.

Tables share the first `--partitions` lanes, each by a hash of its name. A table of `--lanes` has lanes of its own behind those, one
table's after the other's, and each of its rows lies in one of them, by a hash of its key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from live_migration.common.errors import UsageError
from live_migration.common.relation import QualifiedName

BYTEWISE_TYPES = frozenset({16, 17, 19, 20, 21, 23, 25, 26, 1043, 1082, 1083, 1114, 1184, 2950})
"""Built-in types whose values are equal exactly when their bytes are, those of text under a deterministic collation."""
MOST_LANES = 64
"""Of one table."""

_IDENTIFIER = r'"(?:[^"]|"")+"|[^\s".=]+'
_WORD = re.compile(rf"\s*(?:(?P<schema>{_IDENTIFIER})\.)?(?P<table>{_IDENTIFIER})\s*=\s*(?P<count>[0-9]{{1,4}})\s*")
_FORM = "Write it as 'schema.table=number', e.g. 'public.metrics=4'."


def lane_of(target_name: QualifiedName, lane_count: int) -> int:
    """Give the lane of a table among those that tables share, 0 to `lane_count` - 1, stable over processes and versions.

    The name is the table's on the target, so that all chunks of a hypertable meet in one lane.
    """
    return crc32(target_name.sql.encode()) % lane_count


@dataclass(frozen=True, slots=True)
class LaneMap:
    """All lanes of a change log: `shared` ones, then those of the tables in `split`, in this order, each with how many it has."""

    shared: int
    split: tuple[tuple[QualifiedName, int], ...] = ()

    @property
    def lane_count(self) -> int:
        """How many lanes there are."""
        return self.shared + sum(count for _, count in self.split)

    def lanes_of(self, target_name: QualifiedName) -> range:
        """Give the lanes that a table lies in; the first one leads where there are several."""
        first = self.shared
        for name, count in self.split:
            if name == target_name:
                return range(first, first + count)
            first += count
        lane = lane_of(target_name, self.shared)
        return range(lane, lane + 1)


def parse_lanes(words: Sequence[str]) -> tuple[tuple[QualifiedName, int], ...]:
    """Read `--lanes`: each table with its number of lanes, sorted by name. Names without quotes are in lower case, as in SQL.

    Raises:
        UsageError: a word cannot be read, or a table is named twice.
    """
    found: dict[QualifiedName, int] = {}
    for word in words:
        match = _WORD.fullmatch(word)
        if not match:
            raise UsageError(f"cannot read lanes '{word}'", hint=_FORM)
        name, count = (
            QualifiedName(_unquoted(match["schema"] or "public"), _unquoted(match["table"])),
            int(match["count"]),
        )
        if not 2 <= count <= MOST_LANES:
            raise UsageError(f"{name} cannot have {count} lanes", hint=f"A table can have 2 to {MOST_LANES}.")
        if name in found:
            raise UsageError(f"--lanes names {name} twice", hint="Name each table once.")
        found[name] = count
    return tuple(sorted(found.items()))


def _unquoted(text: str) -> str:
    if text.startswith('"'):
        return text[1:-1].replace('""', '"')
    return "".join(letter.lower() if letter.isascii() else letter for letter in text)  # as the server folds them
