"""Values of the stream in a form that people can read, and JSON can hold."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

from live_migration.common.pgoutput import EPOCH, timestamp

JsonValue = str | None | dict[str, str] | dict[str, bool]


def readable(type_oid: int, value: bytes) -> JsonValue:
    """Give a binary value of a common type as its text, any other one as base64."""
    try:
        decode = _DECODERS.get(type_oid)
        return decode(value) if decode else {"$binary": base64.b64encode(value).decode()}
    except (struct.error, ValueError, OverflowError):
        return {"$binary": base64.b64encode(value).decode()}


def _integer(value: bytes) -> str:
    return str(int.from_bytes(value, "big", signed=True))


def _timestamp(value: bytes) -> str:
    microseconds = int.from_bytes(value, "big", signed=True)
    if microseconds in (2**63 - 1, -(2**63)):
        return "infinity" if microseconds > 0 else "-infinity"
    return str(timestamp(microseconds).replace(tzinfo=None))


def _date(value: bytes) -> str:
    days = int.from_bytes(value, "big", signed=True)
    if days in (2**31 - 1, -(2**31)):
        return "infinity" if days > 0 else "-infinity"
    return str((EPOCH + timedelta(days=days)).date())


_NUMERIC_SPECIAL = {0xC000: "NaN", 0xD000: "Infinity", 0xF000: "-Infinity"}


def _numeric(value: bytes) -> str:
    """Give a numeric: a sign and digits to the base of 10,000, the first of which counts 10,000 to the power of `weight`."""
    count, weight, sign, scale = struct.unpack_from(">HhHH", value)
    if sign in _NUMERIC_SPECIAL:
        return _NUMERIC_SPECIAL[sign]
    digits = "".join(f"{digit:04}" for digit in struct.unpack_from(f">{count}H", value, 8))
    point = 4 * (weight + 1)
    digits = digits.rjust(len(digits) - point, "0") if point < 0 else digits.ljust(point, "0")
    whole, fraction = digits[: max(point, 0)], digits[max(point, 0) :]
    text = whole.lstrip("0") or "0"
    if scale:
        text += f".{fraction[:scale].ljust(scale, '0')}"
    return f"-{text}" if sign else text


_DECODERS: dict[int, Callable[[bytes], str]] = {
    **dict.fromkeys((20, 21, 23), _integer),
    **dict.fromkeys((19, 25, 114, 1042, 1043), bytes.decode),
    16: lambda value: "t" if value == b"\1" else "f",
    17: lambda value: f"\\x{value.hex()}",
    26: lambda value: str(int.from_bytes(value, "big")),
    700: lambda value: f"{struct.unpack('>f', value)[0]:.9g}",
    701: lambda value: repr(struct.unpack(">d", value)[0]),
    1082: _date,
    1114: _timestamp,
    1184: lambda value: f"{_timestamp(value)}+00" if "infinity" not in _timestamp(value) else _timestamp(value),
    1700: _numeric,
    2950: lambda value: str(UUID(bytes=value)),
    3802: lambda value: value[1:].decode(),
}
"""By type oid: integers, text of all kinds and json, bool, bytea, oid, floats, dates, timestamps, numeric, uuid, jsonb."""
