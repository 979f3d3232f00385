"""Rates, remaining times and the lag line, from readings of state and control topic. Pure: clocks and readings come in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

CAUGHT_UP_BYTES = 512_000
"""Below this lag the target counts as caught up, as in the original program."""
CAUGHT_UP_SECONDS = 10.0
"""So it does where the lag would be gone in this time at the present rates."""
_NAMES_SHOWN = 10


def format_bytes(count: float) -> str:
    """Give a number of bytes for people: `512 B`, `1.5 MiB`."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def format_count(count: float) -> str:
    """Give a number for people, thousands apart: `1,234,567`."""
    return f"{count:,.0f}"


def format_number_of(count: int, noun: str) -> str:
    """Give a number with its noun, which takes an s in the plural: `1 table`, `2,000 tables`."""
    return f"{format_count(count)} {noun}{'' if count == 1 else 's'}"


def name_list(names: Iterable[object]) -> str:
    """Give names for a message, the first ten of them."""
    given = [str(name) for name in names]
    more = len(given) - _NAMES_SHOWN
    return ", ".join(given[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def format_duration(seconds: float) -> str:
    """Give a time span in words: `1 minute 38.631 seconds`, `2 hours 5 minutes 0.000 seconds`."""
    minutes, rest = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    words = [
        f"{number} {unit}{'' if number == 1 else 's'}"
        for number, unit in ((days, "day"), (hours, "hour"), (minutes, "minute"))
        if number
    ]
    return " ".join([*words, f"{rest / 1000:.3f} seconds"])


def format_clock(seconds: float | None) -> str:
    """Give a time span as `h:mm:ss`, or `-:--:--` where it is not known."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class RateMeter:
    """Rate of a growing number over the last `window_seconds`; not known before `least_seconds` have passed."""

    def __init__(self, window_seconds: float = 30.0, least_seconds: float = 0.0) -> None:
        self._window_seconds = window_seconds
        self._least_seconds = least_seconds
        self._readings: deque[tuple[float, float]] = deque()

    def add(self, at: float, value: float) -> None:
        """Note a reading; times must not go back. A number that fell has begun anew."""
        readings = self._readings
        if readings and value < readings[-1][1]:
            readings.clear()
        readings.append((at, value))
        while len(readings) > 2 and readings[1][0] <= at - self._window_seconds:
            readings.popleft()

    @property
    def rate(self) -> float | None:
        """Units per second, or None where it is not known yet."""
        if len(self._readings) < 2:
            return None
        (first_at, first), (last_at, last) = self._readings[0], self._readings[-1]
        seconds = last_at - first_at
        return (last - first) / seconds if seconds > 0 and seconds >= self._least_seconds else None


def remaining_seconds(done: float, total: float, rate: float | None) -> float | None:
    """Give the time until `total` at this rate; None where that cannot be said."""
    if total <= done:
        return 0.0
    return (total - done) / rate if rate and rate > 0 else None


@dataclass(frozen=True, slots=True)
class TableProgress:
    """How far one table's copy is. `row_estimate` and `size_bytes` are the source's, as planned."""

    name: str
    state: str
    row_count: int
    byte_count: int
    row_estimate: int
    size_bytes: int
    part_count: int = 0
    parts_done: int = 0
    error: str = ""
    hint: str = ""

    @property
    def is_copied(self) -> bool:
        """Whether all its rows are on the target."""
        return self.state in ("copied", "ready")

    @property
    def fraction(self) -> float:
        """Share that is copied, 0 to 1; 1 only for a whole table, for the estimates are no more than that."""
        if self.is_copied:
            return 1.0
        if self.row_estimate > 0:
            return min(self.row_count / self.row_estimate, 0.99)
        if self.part_count:
            return min(self.parts_done / self.part_count, 0.99)
        return 0.0

    @property
    def done_bytes(self) -> float:
        """Copied part of its size on the source: what totals and remaining times are reckoned in."""
        return self.fraction * self.size_bytes


@dataclass(frozen=True, slots=True)
class CopyTotals:
    """All tables together."""

    tables: int
    tables_copied: int
    row_count: int
    byte_count: int
    done_bytes: float
    size_bytes: int


def sum_up(tables: Sequence[TableProgress]) -> CopyTotals:
    """Add up the tables' progress."""
    return CopyTotals(
        len(tables),
        sum(table.is_copied for table in tables),
        sum(table.row_count for table in tables),
        sum(table.byte_count for table in tables),
        sum(table.done_bytes for table in tables),
        sum(table.size_bytes for table in tables),
    )


class LagState(Enum):
    """What the lag line says."""

    UNKNOWN = "unknown"
    CAUGHT_UP = "caught up"
    FALLING_BEHIND = "falling behind"
    CATCHING_UP = "catching up"


@dataclass(frozen=True, slots=True)
class Lag:
    """How far the target is behind the source, in bytes of WAL; a rate is None before it could be measured."""

    lag_bytes: int
    source_wal_rate: float | None = None
    target_replay_rate: float | None = None

    @property
    def state(self) -> LagState:
        """Judge the lag as the original does."""
        if self.lag_bytes < CAUGHT_UP_BYTES:
            return LagState.CAUGHT_UP
        if self.source_wal_rate is None or self.target_replay_rate is None:
            return LagState.UNKNOWN
        net_rate = self.target_replay_rate - self.source_wal_rate
        if self.lag_bytes < CAUGHT_UP_SECONDS * net_rate:
            return LagState.CAUGHT_UP
        return LagState.CATCHING_UP if net_rate > 0 else LagState.FALLING_BEHIND

    @property
    def is_caught_up(self) -> bool:
        """Whether a cutover would take seconds."""
        return self.state is LagState.CAUGHT_UP

    @property
    def remaining_seconds(self) -> float | None:
        """Time until the target has caught up, where it does."""
        if self.state is LagState.CATCHING_UP:
            assert self.target_replay_rate is not None
            assert self.source_wal_rate is not None
            return self.lag_bytes / (self.target_replay_rate - self.source_wal_rate)
        return 0.0 if self.is_caught_up else None

    @property
    def line(self) -> str:
        """The lag line, in the original's words."""
        figures = (
            f"(source_wal_rate: {_rate(self.source_wal_rate)}, target_replay_rate: {_rate(self.target_replay_rate)}, "
            f"replay_lag: {format_bytes(self.lag_bytes)})"
        )
        match self.state:
            case LagState.CAUGHT_UP:
                return f"Target has caught up with source {figures}"
            case LagState.FALLING_BEHIND:
                return f"WARNING live-replay not keeping up with source load {figures}"
            case LagState.CATCHING_UP:
                return f"Live-replay will complete in {format_duration(self.remaining_seconds or 0.0)} {figures}"
            case LagState.UNKNOWN:
                return f"Applying buffered transactions {figures}"


def _rate(rate: float | None) -> str:
    return "not known yet" if rate is None else f"{format_bytes(rate)}/s"


class LagMeter:
    """Turn readings of source, log and checkpoints into the lag.

    A lane that no transaction touched keeps its old checkpoint; it is as far as the log itself once the checkpoint
    has reached the log's last position of that lane. What was reached stays reached, so that one new change in a lane
    that was long idle does not look like hours of lag.
    """

    def __init__(self, start_lsn: int = 0, window_seconds: float = 30.0, least_seconds: float = 5.0) -> None:
        """Measure rates over `window_seconds`, and judge by none before `least_seconds`: replay comes in bursts."""
        self._start_lsn = start_lsn
        self._reached: dict[int, int] = {}
        self._source = RateMeter(window_seconds, least_seconds)
        self._replay = RateMeter(window_seconds, least_seconds)

    def read(
        self,
        at: float,
        *,
        source_lsn: int,
        log_end: int,
        log_lanes: Sequence[tuple[int, int]],
        checkpoints: Mapping[int, tuple[int, int]],
    ) -> Lag:
        """Note one reading and give the lag.

        Args:
            at: seconds of any steady clock.
            source_lsn: end of the source's WAL.
            log_end: the log holds every transaction that ends at or before it (`LogPosition.confirm_lsn`).
            log_lanes: last position of each lane in the log, read before the checkpoints were.
            checkpoints: what is applied, by lane.
        """
        for lane, last in enumerate(log_lanes):
            applied = checkpoints.get(lane, (0, 0))
            now = log_end if applied >= last else applied[0]
            self._reached[lane] = max(self._reached.get(lane, self._start_lsn), now)
        replayed = min(self._reached.values(), default=self._start_lsn)
        self._source.add(at, source_lsn)
        self._replay.add(at, replayed)
        return Lag(max(source_lsn - replayed, 0), self._source.rate, self._replay.rate)
