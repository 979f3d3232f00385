"""The entry point: hides what is secret among our own arguments, then runs the command.

Anybody on a machine can read a process's arguments, only its owner its environment. So the program starts itself anew
at once with URIs and passwords in the environment; hence nothing slow is imported before that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

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


def hide_secrets() -> None:
    """Start this program anew without secrets among its arguments, if there are any; then it does not return."""
    arguments = sys.argv[1:]
    visible, hidden = without_secrets(arguments)
    if hidden:
        command = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
        os.execve(sys.executable, [*command, *visible], {**os.environ, **hidden})


def main() -> None:
    """Run the command line."""
    try:
        hide_secrets()
        from live_migration.coordinator.commands import run  # takes its time, during which secrets could be seen

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before a command took care of ctrl-C itself
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
