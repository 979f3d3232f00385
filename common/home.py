"""Where a relation's changes belong that is a part of a hypertable: a frame of the change log that stands before its Relation message.

    u8   'h'
    u32  oid of the relation, on the source
    u8   'c': a chunk, its rows are the hypertable's; 'z': a table of compressed rows: a row there that no marker encloses
         says that rows of its chunk changed unseen
    strings, each ended by a zero byte: the hypertable's schema and name, the chunk's schema and name

Once a chunk is compressed into a table that does not tell its changes yet (it has no full replica identity), a frame says so:

    u8   's'
    u32  oid of that table, whose home stands before

The stream names chunks only, and what a chunk belongs to may be gone from the source when its changes are applied, so the
producer, who saw the chunk being made, says it in the log.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from live_migration.common.errors import FormatError
from live_migration.common.relation import QualifiedName

HOME = 0x68  # 'h', no type of pgoutput
SUSPECT = 0x73  # 's', neither
_CHUNK, _COMPRESSED = ord("c"), ord("z")
_HEAD = struct.Struct(">BIB")


@dataclass(frozen=True, slots=True)
class Home:
    """A chunk of a hypertable, or (`is_compressed`) the table of a chunk's compressed rows. Names are the source's."""

    hypertable: QualifiedName
    chunk: QualifiedName
    is_compressed: bool = False


def encode_home(oid: int, home: Home) -> bytes:
    """Give the message that says where relation `oid` belongs."""
    names = (home.hypertable.schema, home.hypertable.name, home.chunk.schema, home.chunk.name)
    head = _HEAD.pack(HOME, oid, _COMPRESSED if home.is_compressed else _CHUNK)
    return head + b"".join(name.encode() + b"\0" for name in names)


def decode_home(message: bytes) -> tuple[int, Home]:
    """Read such a message: the relation's oid, and where it belongs.

    Raises:
        FormatError: it is malformed.
    """
    try:
        _, oid, kind = _HEAD.unpack_from(message)
        schema, name, chunk_schema, chunk_name, rest = message[_HEAD.size :].decode().split("\0")
    except (struct.error, ValueError) as error:
        raise FormatError(f"home message of {len(message)} bytes is malformed") from error
    if rest or kind not in (_CHUNK, _COMPRESSED):
        raise FormatError(f"home message of {len(message)} bytes is malformed")
    return oid, Home(QualifiedName(schema, name), QualifiedName(chunk_schema, chunk_name), kind == _COMPRESSED)


def encode_suspect(oid: int) -> bytes:
    """Give the message that says of a table of compressed rows that what is changed there may not be told."""
    return bytes([SUSPECT]) + oid.to_bytes(4, "big")


def decode_suspect(message: bytes) -> int:
    """Give the oid of the table that such a message speaks of."""
    return int.from_bytes(message[1:5], "big")
