"""Memory given back."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from live_migration.common.memory import keep_collected


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Cycles stay, as they do for an hour where few objects are made."""
    gc.disable()
    yield
    gc.enable()


class _Session:
    def __init__(self) -> None:
        self.error: Exception | None = None
        self.buffer = bytearray(1 << 20)

    def breaks(self) -> None:
        try:
            raise ConnectionError("cut")
        except ConnectionError as error:
            self.error = error  # which holds this frame, and so this session


@pytest.mark.usefixtures("no_collector")
async def test_what_a_broken_session_leaves_in_a_cycle_is_freed() -> None:
    session = _Session()
    session.breaks()
    left = weakref.ref(session)
    freed = asyncio.Event()
    weakref.finalize(session, freed.set)
    del session
    assert left() is not None
    collecting = asyncio.create_task(keep_collected(0.001))
    async with asyncio.timeout(10):
        await freed.wait()
    collecting.cancel()
    assert left() is None
