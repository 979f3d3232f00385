"""Memory given back: what only cycles hold, and what lies free in the C library's heap."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from contextlib import suppress

_INTERVAL_SECONDS = 30.0


def collect() -> None:
    """Free what only cycles hold, and give free pages back to the system.

    An error holds the frames that it went through, and these whatever they worked with: each broken connection leaves a megabyte and
    more. Python looks for such cycles by the count of objects, which are few, so that it may not look for an hour. And glibc keeps
    what lies free below anything that is in use, until it is told to look.
    """
    gc.collect()
    with suppress(AttributeError, OSError):  # no such call: musl, macOS
        ctypes.CDLL(None).malloc_trim(0)


async def keep_collected(interval: float = _INTERVAL_SECONDS) -> None:
    """Collect now and then, for ever."""
    while True:
        await asyncio.sleep(interval)
        collect()
