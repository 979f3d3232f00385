"""What a case is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.results import CaseResult, Plan


class Skipped(Exception):
    """A case cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Case:
    """A named measurement. `aim`: the ratio that is to be reached, for cases with a peer."""

    name: str
    about: str
    run: Callable[[Plan], Awaitable[CaseResult]]
    aim: float | None = None
