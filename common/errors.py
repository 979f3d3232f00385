"""Every error that this program raises on purpose.

    LiveMigrationError
    ├── UsageError             the command's words or settings are wrong (exit 2)
    ├── SourceError            the source refuses, or lacks something
    │   ├── PublicationLost    a publication is gone or altered
    │   └── SlotError          the slot is foreign, or cannot be had
    │       └── SlotLost       the slot does not hold what follows the change log any more
    ├── TargetError            the target refuses, or lacks something
    │   ├── LaneStopped        a change cannot be applied: its lane stops there, the others go on
    │   └── Fenced             somebody else took over what we held; leave without a trace
    ├── KafkaError             the broker refuses, or the topic is not as we made it
    │   └── LogGap             the change log lacks a part: never read on
    ├── FormatError            bytes that are not what the format says
    └── Connection errors      `ConnectionLost`: reconnect and go on from the stored position
        └── KafkaAway          it is the broker: what needs none goes on

`retry` says what the caller does: reconnect, or stop. Unknown errors stop.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar


class Retry(Enum):
    """What to do after an error."""

    RECONNECT = "reconnect"
    STOP = "stop"


class LiveMigrationError(Exception):
    """Something went wrong: `message` says what and where, `hint` what to do next."""

    retry: ClassVar[Retry] = Retry.STOP
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UsageError(LiveMigrationError):
    """The command line or the settings cannot be used as given."""

    exit_code = 2


class SourceError(LiveMigrationError):
    """The source refuses what we ask, or lacks what we need."""


class SlotError(SourceError):
    """The replication slot cannot be had, or is not ours."""

    default_hint = "Run `live-migration clean` and start the migration again."


RECOPY = (
    "Run `live-migration migrate --recopy`: it makes slot and change log anew and copies every table again, "
    "with the schema and all settings kept."
)


class SlotLost(SlotError):
    """Changes after the end of the change log cannot be had any more: the tables must be copied again."""

    default_hint = RECOPY


class PublicationLost(SourceError):
    """A publication of ours does not tell all changes any more: the tables must be copied again."""

    default_hint = f"Nobody but this program may alter its publications. {RECOPY}"


class TargetError(LiveMigrationError):
    """The target refuses what we ask, or lacks what we need."""


class LaneStopped(TargetError):
    """A change cannot be applied; its lane waits until the target can take it."""


class Fenced(TargetError):
    """A successor holds what we held; nothing of ours may be written any more."""


class KafkaError(LiveMigrationError):
    """The broker refuses what we ask, or a topic is not as we made it."""


class LogGap(KafkaError):
    """The change log lacks changes: between two segments, at its end, or all of them."""

    default_hint = f"The topic was changed by somebody else or the broker lost data. {RECOPY}"


class FormatError(LiveMigrationError):
    """Bytes that do not follow their format."""


class ConnectionLost(LiveMigrationError):
    """A server or the broker cannot be reached just now."""

    retry = Retry.RECONNECT


class KafkaAway(ConnectionLost):
    """The broker cannot be reached just now, or does not answer."""
