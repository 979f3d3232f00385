"""Runs of nothing but updates of whole rows under an unchanged key: folded and staged without decoding a row.

What counts of such a run is the last message of each key, and that is a row in the form of COPY but for a few bytes, as an insert is.
Measured on four columns: 1.3 µs a row, where folding by values takes 8 µs.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from live_migration.common import pgoutput
from live_migration.common.errors import FormatError
from live_migration.consumer.row_code import copy_rows
from live_migration.consumer.row_encoding import CopyRow, Message
from live_migration.consumer.target_tables import TargetTable

_SIZE = Struct(">I")
_TUPLE_AT = 8
"""Where the first value stands in a message that has no old row; as in an Insert."""
_NEW = ord("N")
_VALUES = b"tb"


def plain_updates(table: TargetTable, messages: Sequence[Message], *, binary: bool) -> tuple[int, list[CopyRow]] | None:
    """Give how many rows the run updates, and all columns of each as it leaves them, as rows of COPY.

    None where it has to be folded by values: other changes, changed keys, values that the stream does not carry, keys that are not
    the first columns, columns that the target does not take.
    """
    keys = [column.index for column in table.key]
    if not keys or keys != list(range(len(keys))) or table.kept is not None or table.has_always_identity:
        return None
    last = _last_of_each_key(messages, len(keys))
    if last is None:
        return None
    try:
        return len(last), list(copy_rows(table.relation, last, binary=binary))
    except FormatError:  # a TOASTed value that was left alone
        return None


def _last_of_each_key(messages: Sequence[Message], key_count: int) -> list[Message] | None:
    last: dict[bytes, Message] = {}
    unpack = _SIZE.unpack_from
    for message in messages:
        if type(message) is not bytes or message[0] != pgoutput.UPDATE or message[5] != _NEW:
            return None
        at = _TUPLE_AT
        for _ in range(key_count):
            if message[at] not in _VALUES:
                return None
            at += 5 + unpack(message, at + 1)[0]
        last[message[_TUPLE_AT:at]] = message
    return list(last.values())
