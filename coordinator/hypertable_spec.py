"""What users say of tables that become hypertables: `public.metrics:time,1 day,device_id,4`. Pure but for reading the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from live_migration.common.errors import UsageError
from live_migration.common.relation import QualifiedName, quote_identifier
from live_migration.coordinator.hypertable_definitions import Dimension, Hypertable

SECOND = 1_000_000
HOUR = 3600 * SECOND
DAY = 24 * HOUR
_MONTH = 30 * DAY  # as TimescaleDB counts it
_UNITS = {
    "microsecond": 1, "millisecond": 1000, "second": SECOND, "sec": SECOND, "minute": 60 * SECOND, "min": 60 * SECOND,
    "hour": HOUR, "h": HOUR, "day": DAY, "d": DAY, "week": 7 * DAY, "w": 7 * DAY, "month": _MONTH, "mon": _MONTH,
    "year": 12 * _MONTH, "y": 12 * _MONTH,
}  # fmt: skip
_SHOWN = ("day", "hour", "minute", "second", "microsecond")
_LARGEST = 2**63 - 1
_LONGEST_NAME = 63

_IDENTIFIER = r'"(?:[^"]|"")+"|[^\s".:,]+'
_SPEC = re.compile(
    rf"\s*(?:(?P<schema>{_IDENTIFIER})\.)?(?P<table>{_IDENTIFIER})\s*:\s*(?P<column>{_IDENTIFIER})\s*,"
    rf"\s*(?P<interval>[^,]+?)\s*(?:,\s*(?P<partition_column>{_IDENTIFIER})\s*,\s*(?P<partitions>[^,]+?)\s*)?"
)
_NAMES = re.compile(rf"\s*(?:{_IDENTIFIER})(?:\.(?:{_IDENTIFIER}))*\s*")
_PART = re.compile(r"(\d+)\s*([a-z]+)\s*")
_FORM = "Write it as 'schema.table:time_column,interval[,partition_column,number]', e.g. 'public.metrics:time,1 day'."

Name = Annotated[str, Field(min_length=1)]


class HypertableSpec(BaseModel):
    """A table that is to become a hypertable.

    `interval`: microseconds where `is_duration`, else in the unit of an integer column.
    """

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    name: QualifiedName
    column: Name
    interval: int = Field(gt=0, le=_LARGEST)
    is_duration: bool
    partition_column: Name | None = None
    partitions: int | None = Field(default=None, ge=1, le=32767)

    @model_validator(mode="after")
    def _makes_sense(self) -> HypertableSpec:
        if self.partition_column == self.column:
            raise ValueError(f"{self.column} cannot be both the time column and the partition column")
        names = (self.name.schema, self.name.name, self.column, self.partition_column or "")
        if long := [name for name in names if len(name.encode()) > _LONGEST_NAME]:
            raise ValueError(f"a name is longer than PostgreSQL's {_LONGEST_NAME} bytes: {long[0]}")
        return self

    @property
    def partitioning_columns(self) -> tuple[str, ...]:
        """The columns that every unique key must have."""
        return (self.column,) if self.partition_column is None else (self.column, self.partition_column)

    def __str__(self) -> str:
        """Give it as a user would write it."""
        name = f"{shown(self.name.schema)}.{shown(self.name.name)}"
        interval = format_interval(self.interval) if self.is_duration else str(self.interval)
        space = f",{shown(self.partition_column)},{self.partitions}" if self.partition_column else ""
        return f"{name}:{shown(self.column)},{interval}{space}"


def definition_of(spec: HypertableSpec, types: dict[str, str]) -> Hypertable:
    """Give the hypertable that is asked for; `types`: those of the table's columns, by name."""
    dimensions = [Dimension(spec.column, types[spec.column], spec.interval)]
    if spec.partition_column is not None:
        column = spec.partition_column
        dimensions.append(Dimension(column, types[column], partitions=spec.partitions))
    return Hypertable(spec.name, tuple(dimensions))


def parse_spec(text: str) -> HypertableSpec:
    """Read one word of the user's; names without quotes are in lower case, as in SQL, and the schema may be left out.

    Raises:
        UsageError: it is not of the form, or a part of it makes no sense.
    """
    found = _SPEC.fullmatch(text)
    if not found:
        raise UsageError(f"cannot read hypertable '{text}'", hint=_FORM)
    interval, is_duration = parse_interval(found["interval"], of=text)
    try:
        return HypertableSpec(
            name=QualifiedName(_name(found["schema"]) or "public", _name(found["table"]) or ""),
            column=_name(found["column"]) or "",
            interval=interval,
            is_duration=is_duration,
            partition_column=_name(found["partition_column"]),
            partitions=found["partitions"],  # type: ignore[arg-type]  # pydantic reads the number, and says what is wrong with it
        )
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}" if each["loc"] else each["msg"].split(", ", 1)[-1]
            for each in error.errors(include_input=False, include_url=False)
        )
        raise UsageError(f"cannot use hypertable '{text}': {wrong}", hint=_FORM) from None


def parse_interval(text: str, *, of: str) -> tuple[int, bool]:
    """Give an interval and whether it is one of time, then in microseconds: `1 day`, `12 hours`, `86400`.

    Raises:
        UsageError: it is neither; the message names `of`.
    """
    text = text.strip().lower()
    if text.isascii() and text.isdecimal():
        return int(text), False
    if not re.fullmatch(rf"(?:{_PART.pattern})+", text, re.ASCII):
        raise UsageError(f"cannot read the interval '{text}' of hypertable '{of}'", hint=_FORM)
    total = 0
    for number, unit in _PART.findall(text):
        length = _UNITS.get(unit) or _UNITS.get(unit.removesuffix("s"))
        if length is None:
            raise UsageError(f"'{unit}' in hypertable '{of}' is no unit of time", hint="Known are second to year.")
        total += int(number) * length
    return total, True


def format_interval(microseconds: int) -> str:
    """Give a time span as `parse_interval` reads it: `1 day`, `1 day 12 hours`."""
    words = []
    for unit in _SHOWN:
        count, microseconds = divmod(microseconds, _UNITS[unit])
        if count:
            words.append(f"{count} {unit}{'' if count == 1 else 's'}")
    return " ".join(words)


def read_specs(words: Sequence[str], file: Path | None) -> tuple[HypertableSpec, ...]:
    """Read what `--hypertable` and `--hypertables-file` say: one a line, `#` begins a comment line.

    Raises:
        UsageError: names everything that cannot be read, and each table that is named twice.
    """
    specs, wrong = [], []
    for where, text in (*(("--hypertable", word) for word in words), *_lines(file)):
        try:
            specs.append(parse_spec(text))
        except UsageError as error:
            wrong.append(f"{where}: {error.message}")
    if wrong:
        raise UsageError("; ".join(wrong), hint=_FORM)
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"hypertables are named twice: {', '.join(map(str, twice))}", hint="Name each table once.")
    return tuple(specs)


def _lines(file: Path | None) -> Iterable[tuple[str, str]]:
    if file is None:
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(f"cannot read {file}: {reason}", hint="Check --hypertables-file.") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{file}:{number}", line


def parse_names(text: str) -> tuple[str, ...]:
    """Give the names in `schema.table.name`, each as SQL reads it; none where it is no such thing."""
    if not _NAMES.fullmatch(text):
        return ()
    return tuple(_name(each) or "" for each in re.findall(_IDENTIFIER, text))


def _name(text: str | None) -> str | None:
    if text is None:
        return None
    if text.startswith('"'):
        return text[1:-1].replace('""', '"')
    return "".join(letter.lower() if letter.isascii() else letter for letter in text)  # as the server folds them


def shown(name: str) -> str:
    """Give a name as a user has to write it."""
    return name if re.fullmatch(r"[a-z_][a-z0-9_$]*", name) else quote_identifier(name)
