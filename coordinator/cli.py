"""The entry point: starts the program anew where its arguments or its allocator call for it, then runs the command.

Anybody on a machine can read a process's arguments, only its owner its environment: URIs and passwords go into the
environment. And Python takes its allocator from there before anything of ours runs. So the program starts itself anew
at once; hence nothing slow is imported before that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

_VARIABLES = {"--source": "SOURCE", "--target": "TARGET", "--kafka-password": "LIVE_MIGRATION_KAFKA_PASSWORD"}


def without_secrets(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split arguments into those that may be seen, and environment variables for those that may not."""
    visible: list[str] = []
    hidden: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        option, has_value, value = argument.partition("=")
        if option not in _VARIABLES:
            visible.append(argument)
        elif has_value:
            hidden[_VARIABLES[option]] = value
        elif (following := next(rest, None)) is not None:
            hidden[_VARIABLES[option]] = following
        else:
            visible.append(argument)  # its value is missing: let the command say so
    return visible, hidden


def allocator(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Give the environment variable that has a consumer use the C library's allocator, unless one is chosen there.

    Rows that a consumer holds while it lags lie among a few objects that live on. Python's own allocator gives back
    arenas of 1 MiB, and only empty ones, so that hours of lagging now and then let a consumer grow; what the C
    library holds free goes back page by page (`common.memory`). docs/reliability.md has both measured.
    """
    return {"PYTHONMALLOC": "malloc"} if "consumer" in arguments and not environment.get("PYTHONMALLOC") else {}


def start_anew() -> None:
    """Start this program anew if its arguments hold secrets or its allocator is to be another; then it does not return."""
    arguments = sys.argv[1:]
    visible, hidden = without_secrets(arguments)
    if changed := {**hidden, **allocator(visible, os.environ)}:
        command = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
        os.execve(sys.executable, [*command, *visible], {**os.environ, **changed})


def main() -> None:
    """Run the command line."""
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # NumPy's: it starts a thread a processor, for what nobody asks here
    try:
        start_anew()
        from live_migration.coordinator.commands import run  # takes its time, during which secrets could be seen

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before a command took care of ctrl-C itself
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
