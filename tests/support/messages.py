"""pgoutput messages built byte by byte, so that encoder and decoder check each other."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from live_migration.consumer.row_encoding import UNCHANGED, Value


def put_tuple(values: Sequence[Value], *, binary: bool = False) -> bytes:
    """Give a TupleData."""
    parts = [struct.pack(">H", len(values))]
    for value in values:
        if value is None:
            parts.append(b"n")
        elif value is UNCHANGED:
            parts.append(b"u")
        else:
            parts.append((b"b" if binary else b"t") + struct.pack(">I", len(value)) + value)
    return b"".join(parts)


def put_insert(oid: int, new: Sequence[Value], *, binary: bool = False) -> bytes:
    return b"I" + struct.pack(">I", oid) + b"N" + put_tuple(new, binary=binary)


def put_update(
    oid: int,
    new: Sequence[Value],
    *,
    key: Sequence[Value] | None = None,
    old: Sequence[Value] | None = None,
    binary: bool = False,
) -> bytes:
    before = b"K" + put_tuple(key) if key is not None else b"O" + put_tuple(old) if old is not None else b""
    return b"U" + struct.pack(">I", oid) + before + b"N" + put_tuple(new, binary=binary)


def put_delete(oid: int, *, key: Sequence[Value] | None = None, old: Sequence[Value] | None = None) -> bytes:
    before = b"K" + put_tuple(key) if key is not None else b"O" + put_tuple(old or ())
    return b"D" + struct.pack(">I", oid) + before
