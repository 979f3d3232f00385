"""The phases of a migration and how one follows another."""

from __future__ import annotations

from live_migration.common.state import Phase

__all__ = ["FOLLOWERS", "Phase", "is_transition_allowed"]

FOLLOWERS: dict[Phase, frozenset[Phase]] = {
    Phase.PREPARE: frozenset({Phase.SCHEMA}),
    # back to prepare by `migrate --recopy`, to copy when a failover of the source undid what was copied
    Phase.SCHEMA: frozenset({Phase.COPY, Phase.PREPARE}),
    Phase.COPY: frozenset({Phase.REPLAY, Phase.PREPARE}),
    Phase.REPLAY: frozenset({Phase.CUTOVER, Phase.COPY, Phase.PREPARE}),
    # to replay when the source is still written to
    Phase.CUTOVER: frozenset({Phase.REPLAY, Phase.DONE, Phase.COPY, Phase.PREPARE}),
    Phase.DONE: frozenset(),
}


def is_transition_allowed(before: Phase, after: Phase) -> bool:
    """Tell whether a migration may go from one phase to another; staying is always allowed."""
    return before is after or after in FOLLOWERS[before]
