"""Conditions that hold for the rows of a chunk, as TimescaleDB's constraints have them: whether two mean the same rows. Pure.

They name columns, which may have got other names since one was read; and whether a row without a value is asked for depends on NOT NULL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_NAME = r'"(?:[^"]|"")+"|[^\W\d][\w$]*'
_TOKEN = re.compile(
    rf"""(?P<text>'(?:[^']|'')*')
      |  (?P<cast>::(?:(?:{_NAME})\.)?(?:{_NAME})(?:\ varying|\ precision)?(?:\(\d+(?:,\d+)?\))?(?:\ with(?:out)?\ time\ zone)?(?:\[\])*)
      |  (?P<called>(?:(?:{_NAME})\.)?(?:{_NAME})\()
      |  (?P<name>{_NAME})
      |  (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = frozenset({"and", "or", "not", "is", "null", "true", "false", "AND", "OR", "NOT", "IS", "NULL"})
_TAKES_NULL = re.compile(r"\(\$\d+ is null or ")


class _Token(NamedTuple):
    text: str
    is_column: bool


def is_same_range(one: str | None, other: str | None) -> bool:
    """Tell whether two conditions of one chunk hold for the same rows, whatever its columns were called, and may be null."""
    return one == other or (one is not None and other is not None and _plain(one) == _plain(other))


def columns_of(condition: str) -> list[str]:
    """Give the columns that a condition names, each once, in order, quoted where SQL has them so."""
    return list(dict.fromkeys(token.text for token in _tokens(condition) if token.is_column))


def with_names(condition: str, names: Mapping[str, str]) -> str:
    """Give a condition with other names of columns, all at once."""
    return "".join(names.get(t.text, t.text) if t.is_column else t.text for t in _tokens(condition))


def find_renames(before: str, now: str) -> dict[str, str]:
    """Give the columns that have other names in the same condition of a chunk as it is now, by those of before."""
    if not is_same_range(before, now):
        return {}
    pairs = zip(columns_of(before), columns_of(now), strict=True)
    return {old: new for old, new in pairs if old != new}


def _tokens(condition: str) -> list[_Token]:
    return [
        _Token(match[0], match.lastgroup == "name" and match[0] not in _WORDS) for match in _TOKEN.finditer(condition)
    ]


def _plain(condition: str) -> str:
    """Give a condition with numbers for its columns, and without what is said of rows that lack a value."""
    places = {column: f"${n}" for n, column in enumerate(columns_of(condition), 1)}
    plain = with_names(condition, places)
    while match := _TAKES_NULL.search(plain):
        end = _closing(plain, match.start())
        plain = plain[: match.start()] + plain[match.end() : end] + plain[end + 1 :]
    return plain


def _closing(condition: str, start: int) -> int:
    """Give where the parenthesis ends that begins at `start`."""
    depth, is_text = 0, False
    for at in range(start, len(condition)):
        character = condition[at]
        is_text ^= character == "'"
        depth += 0 if is_text else (character == "(") - (character == ")")
        if depth == 0:
            return at
    return len(condition)
