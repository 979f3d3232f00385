"""Memory given back to the system: glibc keeps what lies free below anything that is in use, until it is told to look."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from contextlib import suppress

_TRIM_SECONDS = 30.0


def trim() -> None:
    """Give free pages back. Nothing happens where the C library has no such call (musl, macOS)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def collect() -> None:
    """Free what only cycles hold, and give it back.

    An error holds the frames it went through, and these whatever they worked with. A process that makes few objects
    anew is not looked through for an hour, and has a megabyte and more of each broken connection by then.
    """
    gc.collect()
    trim()


async def keep_trimmed() -> None:
    """Trim for ever: what a server that stood still made us hold is else kept for good, though free."""
    while True:
        await asyncio.sleep(_TRIM_SECONDS)
        trim()
