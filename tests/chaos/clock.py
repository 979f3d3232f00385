"""Clocks that are wrong, by libfaketime where it is installed (Debian's package `libfaketime`)."""

from __future__ import annotations

import sys
from pathlib import Path

_RUN = """
import os, select, time
time.sleep = lambda seconds: select.select([], [], [], seconds) and None  # the library makes of clock_nanosleep() EINVAL
for name in ("LD_PRELOAD", "FAKETIME_SHARED"):
    os.environ.pop(name, None)
from live_migration.coordinator.cli import main
main()
"""
CACHE_SECONDS = 1
"""After so long the library looks at its file again."""
_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib", "/usr/local/lib", "/usr/lib64")


def find_library() -> Path | None:
    """Give libfaketime's library for programs with threads, if there is one."""
    for folder in _FOLDERS:
        library = Path(folder) / "faketime" / "libfaketimeMT.so.1"
        if library.exists():
            return library
    return None


class Clock:
    """The wall clock of one process, not of its children; the monotonic clock is left alone, as by an administrator's `date -s`."""

    def __init__(self, library: Path, file: Path) -> None:
        self._library = library
        self._file = file
        self.set(0)

    def set(self, seconds: int) -> None:
        """Let the clock be so many seconds wrong; the process sees it within a second."""
        unfinished = self._file.with_suffix(".new")
        unfinished.write_text(f"{seconds:+}\n")
        unfinished.rename(self._file)

    def command(self, kind: str) -> list[str]:
        """Give the command that runs `live-migration <kind>` by this clock.

        Neither a shell in between nor its children load the library: a killed parent would leave them hanging in its lock.
        """
        variables = {
            "LD_PRELOAD": self._library,
            "FAKETIME_TIMESTAMP_FILE": self._file,
            "FAKETIME_CACHE_DURATION": CACHE_SECONDS,
            "FAKETIME_DONT_FAKE_MONOTONIC": 1,
            "PYTHONMALLOC": "malloc",  # a consumer would start itself anew for it, without the library
        }
        return [
            "env",
            *(f"{name}={value}" for name, value in variables.items()),
            sys.executable,
            "-P",
            "-c",
            _RUN,
            kind,
        ]
