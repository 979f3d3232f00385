"""Small disks that can be filled or made read-only: tmpfs in a mount namespace of our own, which needs root and ends with us."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_MARK = "LIVE_MIGRATION_CHAOS_MOUNTS"
_SIZE = "256m"


def enter_namespace() -> None:
    """Start this program anew in a mount namespace of its own, where that is allowed; else do nothing."""
    if os.environ.get(_MARK) or os.geteuid() != 0 or not shutil.which("unshare"):
        return
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0:
        os.environ[_MARK] = str(os.getpid())
        os.execvp("unshare", ["unshare", "--mount", *sys.orig_argv])


def why_no_disks() -> str:
    """Say why there are no small disks; empty when there can be."""
    if os.environ.get(_MARK) != str(os.getpid()):
        return "a small disk is a tmpfs in a mount namespace, which needs root, the program `unshare` and permission"
    return ""


def mount(folder: Path) -> None:
    """Make `folder` a disk of 256 MiB.

    Raises:
        subprocess.CalledProcessError: this is not allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-o", f"size={_SIZE},mode=0755"]
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=True, capture_output=True)


def unmount(folder: Path) -> None:
    """Take the disk away; whoever still has it open keeps it until then."""
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def lay_read_only(folder: Path) -> None:
    """Let nothing be made, opened for writing, renamed or deleted on the disk any more (EROFS), until `lift_read_only`.

    What is open for writing already can still be written: Linux makes no disk read-only that has such files, but lays the same disk over it so.

    Raises:
        subprocess.CalledProcessError: this is not allowed.
    """
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True, capture_output=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        unmount(folder)
        raise


def lift_read_only(folder: Path) -> None:
    """Take away what `lay_read_only` has laid over the disk."""
    unmount(folder)
