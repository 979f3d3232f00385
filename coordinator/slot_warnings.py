"""What to warn of while the slot keeps WAL on the source. Pure: looks come in, warnings go out, each once."""

from __future__ import annotations

from collections.abc import Sequence

from live_migration.common.progress import format_bytes
from live_migration.producer.slot import SlotState

PERCENT_STEPS = (50, 80, 95)
_BACK_PERCENT = 10
"""A step is warned of again only after the use fell this far below it: a slot that hovers is told once."""
_FIRST_WARNING_BYTES = 8 << 30
_WHAT_TO_DO = "see that the producer runs and reaches both source and Kafka (`live-migration status`)"


class Ladder:
    """Tells of each step once on the way up."""

    def __init__(self, steps: Sequence[int], back: int) -> None:
        self._steps = steps
        self._back = back
        self._told = 0

    def climb(self, value: float) -> int | None:
        """Give the highest step that `value` has reached, if that is news."""
        while self._told and value < self._told - self._back:
            self._told = max((step for step in self._steps if step < self._told), default=0)
        reached = max((step for step in self._steps if step <= value), default=0)
        if reached <= self._told:
            return None
        self._told = reached
        return reached


class SlotWarnings:
    """Looks at one slot again and again. `max_lag_bytes`: our own bound, 0 for none."""

    def __init__(self, name: str, max_lag_bytes: int) -> None:
        self._about = f"slot {name}"
        self._max_lag_bytes = max_lag_bytes
        self._keep_size = Ladder(PERCENT_STEPS, _BACK_PERCENT)
        self._max_lag = Ladder(PERCENT_STEPS, _BACK_PERCENT)
        self._doublings = Ladder([_FIRST_WARNING_BYTES << n for n in range(30)], _FIRST_WARNING_BYTES >> 1)
        self._status = Ladder((1, 2), 1)

    def look(self, slot: SlotState) -> list[str]:
        """Give what there is to warn of now, and was not warned of before."""
        found = [self._keep_size_warning(slot), self._max_lag_warning(slot), self._status_warning(slot)]
        step = self._doublings.climb(slot.retained_bytes)
        if step is not None:
            found.append(f"{self._about} keeps more than {format_bytes(step)} of WAL on the source's disk")
        return [warning for warning in found if warning]

    def _keep_size_warning(self, slot: SlotState) -> str:
        if slot.safe_wal_bytes is None:  # no bound on the source
            return ""
        left = max(slot.safe_wal_bytes, 0)
        step = self._keep_size.climb(100 * slot.retained_bytes / max(slot.retained_bytes + left, 1))
        if step is None:
            return ""
        return (
            f"{self._about} keeps {format_bytes(slot.retained_bytes)} of WAL, over {step} % of what the source's "
            f"max_slot_wal_keep_size lets it; {format_bytes(left)} later the source removes it, the slot is lost and every "
            f"table must be copied again: {_WHAT_TO_DO}, or raise max_slot_wal_keep_size on the source (a reload is enough)"
        )

    def _max_lag_warning(self, slot: SlotState) -> str:
        if not self._max_lag_bytes:
            return ""
        step = self._max_lag.climb(100 * slot.retained_bytes / self._max_lag_bytes)
        if step is None:
            return ""
        return (
            f"{self._about} keeps {format_bytes(slot.retained_bytes)} of WAL, over {step} % of --max-slot-lag "
            f"({format_bytes(self._max_lag_bytes)}), above which it is dropped and every table must be copied again: "
            f"{_WHAT_TO_DO}, or start `migrate` again with a higher --max-slot-lag"
        )

    def _status_warning(self, slot: SlotState) -> str:
        match self._status.climb({"extended": 1, "unreserved": 2}.get(slot.wal_status, 0)):
            case 1:
                return (
                    f"{self._about}: wal_status is extended: it keeps {format_bytes(slot.retained_bytes)} of WAL, more than the "
                    f"source's max_wal_size, on the source's disk: {_WHAT_TO_DO}"
                )
            case 2:
                return (
                    f"{self._about}: wal_status is unreserved: the source's next checkpoint may remove WAL that is still needed, "
                    f"and every table must be copied again: {_WHAT_TO_DO}, and raise max_slot_wal_keep_size on the source now"
                )
        return ""
