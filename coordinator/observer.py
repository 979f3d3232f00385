"""What the conductor tells: to whoever watches, and to the state for `status`."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import asyncpg

from live_migration.common import state
from live_migration.common.state import Phase


class Observer(Protocol):
    """Watches a migration; called from the conductor's event loop, must return at once."""

    def phase_changed(self, phase: Phase) -> None:
        """Take note of the phase that holds from now on; also called once at a resume."""

    def note(self, message: str) -> None:
        """Show a line of progress."""

    def warning(self, message: str) -> None:
        """Show what the user must know."""


class Reporter:
    """Passes everything on to an observer and keeps it for the state's table of events."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._unsaved: deque[tuple[str, str]] = deque(maxlen=1000)
        self._said: dict[str, str] = {}

    def phase_changed(self, phase: Phase) -> None:
        self._unsaved.append(("info", f"phase {phase.value}"))
        self._observer.phase_changed(phase)

    def note(self, message: str) -> None:
        self._unsaved.append(("info", message))
        self._observer.note(message)

    def warning(self, message: str) -> None:
        self._unsaved.append(("warning", message))
        self._observer.warning(message)

    def warn_on_change(self, about: str, message: str) -> None:
        """Warn only when the message about this differs from the last one; an empty one forgets it."""
        if self._said.get(about, "") != message:
            self._said[about] = message
            if message:
                self.warning(message)

    async def save(self, target: asyncpg.Connection) -> None:
        """Write what was told into the state."""
        while self._unsaved:
            level, message = self._unsaved[0]
            await state.record_event(target, level, message)
            self._unsaved.popleft()
