"""Bloom filters of compressed batches: which of them hold on the target, too.

TimescaleDB makes one for each indexed column by itself, of the hashes of its values. Where a hash takes in an oid, an enum's say, the
target's is another, and a filter of the source's bytes would have the target pass over batches which hold what is asked for. Without a
filter (NULL) a batch is looked into: by queries, by UPDATE and DELETE, and where a key is looked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_FILTER = re.compile(r"_ts_meta_v2_bloom[^_]*_(?P<columns>.+)", re.DOTALL)
_CUT_BYTES = 39
"""Up to where a filter's name has those of its columns, with `_` between them; behind four digits of a hash where it is not all of one."""


def filters_that_hold(filters: Iterable[str], others: Collection[str]) -> frozenset[str]:
    """Give the filters, by their columns' names, that are over none of the columns `others`, for certain. Pure.

    TimescaleDB itself finds a filter by its name alone.
    """
    return frozenset(name for name in filters if not _may_be_over(name, others))


def _may_be_over(name: str, others: Collection[str]) -> bool:
    if not others:
        return False
    match = _FILTER.fullmatch(name)
    if match is None or len(match["columns"].encode()) >= _CUT_BYTES:
        return True
    return any(column in match["columns"] for column in others)
