"""Log sequence numbers: positions in the source's WAL, in bytes."""

from __future__ import annotations


class Lsn(int):
    """A WAL position; an int that prints as PostgreSQL does (`16/B374D848`)."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """Read `X/Y`.

        Raises:
            ValueError: `text` is not two hexadecimal halves of at most 32 bits.
        """
        high, slash, low = text.partition("/")
        try:
            high_bits, low_bits = int(high, 16), int(low, 16)
        except ValueError:
            raise ValueError(f"not an LSN: {text!r}") from None
        if not slash or not 0 <= high_bits <= 0xFFFFFFFF or not 0 <= low_bits <= 0xFFFFFFFF:
            raise ValueError(f"not an LSN: {text!r}")
        return cls(high_bits << 32 | low_bits)

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn('{self}')"
