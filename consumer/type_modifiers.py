"""What a column's type modifier (`pg_attribute.atttypmod`) leaves of a value: whether a target's loses something of a source's. Pure."""

from __future__ import annotations

# each type, then its array, whose modifier is that of its elements
_NUMERIC = frozenset({1700, 1231})
_INTERVAL = frozenset({1186, 1187})
_MOMENTS = frozenset({1083, 1266, 1114, 1184, 1183, 1270, 1115, 1185})
_LENGTHS = frozenset({1042, 1043, 1560, 1562, 1014, 1015, 1561, 1563})

_MOST_DIGITS = 6
"""Of a second's fraction, where nothing limits them."""
_HEADER = 4
_EVERY_FIELD, _EVERY_DIGIT = 0x7FFF, 0xFFFF
_YEAR, _MONTH, _DAY, _HOUR, _MINUTE, _SECOND = 2, 1, 3, 10, 11, 12
_COARSE_TO_FINE = (_YEAR, _MONTH, _DAY, _HOUR, _MINUTE, _SECOND)


def may_lose(type_oid: int, source: int, target: int) -> bool:
    """Tell whether a value that fits the source's modifier may be rounded, cut or refused by the target's; -1 limits nothing.

    Of a type that is not known here any other limit may lose something.
    """
    if target < 0 or target == source:
        return False
    if type_oid in _MOMENTS:
        return target < (source if source >= 0 else _MOST_DIGITS)
    if type_oid in _INTERVAL:
        return any(here > there for here, there in zip(_interval(source), _interval(target), strict=True))
    if source < 0:
        return True
    if type_oid in _NUMERIC:
        return any(here > there for here, there in zip(_digits(source), _digits(target), strict=True))
    return source > target if type_oid in _LENGTHS else True


def _digits(modifier: int) -> tuple[int, int]:
    """Give how many digits a numeric has before and behind its point; either may be negative."""
    precision, scale = (modifier - _HEADER) >> 16, (modifier - _HEADER) & 0x7FF
    scale = (scale ^ 0x400) - 0x400
    return precision - scale, scale


def _interval(modifier: int) -> tuple[int, int]:
    """Give how fine the finest field of an interval is, and the digits of its seconds; what is coarser is always kept."""
    if modifier < 0:
        return len(_COARSE_TO_FINE), _MOST_DIGITS
    fields, digits = modifier >> 16 & _EVERY_FIELD, modifier & 0xFFFF
    finest = max(rank for rank, field in enumerate(_COARSE_TO_FINE, start=1) if fields & 1 << field)
    if finest < len(_COARSE_TO_FINE):
        return finest, 0
    return finest, _MOST_DIGITS if digits == _EVERY_DIGIT else digits
