"""What the servers that we run ourselves have in common: a guard that outlives us, a free port, installed programs.

The guard is a small process of its own that holds the other end of a pipe from us. When that pipe ends, because we
closed it or because the kernel did so after a `kill -9`, the guard stops the servers and removes the folders that it
was told of. An orderly stop goes the same way, so the way is always tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil

from live_migration.common.errors import LiveMigrationError

if TYPE_CHECKING:
    from jgo.maven import Artifact, MavenContext

# Below the range that Linux gives to outgoing connections: such a connection could take a stopped server's port.
_PORTS = range(20_000, 32_000)
_LOCK_TIMEOUT_SECONDS = 40.0
# The child's first act is to tell the guard its pid, which `exec` keeps: we may die at any moment after the fork.
_ANNOUNCE_AND_EXEC = 'echo "child $$ $0" >&0 || exit 125; exec "$@" </dev/null'


class LocalServerError(LiveMigrationError):
    """A server of our own does not start or stop as it should."""


@dataclass(frozen=True, slots=True)
class StopOrder:
    """How to stop a child: each signal in turn, the next one when the time is over, SIGKILL to its whole tree last."""

    signals: tuple[signal.Signals, ...]
    grace_seconds: float

    def __str__(self) -> str:
        return f"{','.join(str(int(each)) for each in self.signals)} {self.grace_seconds}"

    @classmethod
    def parse(cls, signals: str, grace_seconds: str) -> StopOrder:
        return cls(tuple(signal.Signals(int(each)) for each in signals.split(",")), float(grace_seconds))


class ChildGuard:
    """Start children and make temporary folders that never outlive this process.

    `close` stops the children and removes the folders; so does the end of this process, whatever ends it.
    """

    def __init__(self, process: subprocess.Popen[bytes], to_guard: IO[bytes]) -> None:
        self._process = process
        self._to_guard = to_guard

    @classmethod
    async def open(cls, *, lock: Path | None = None) -> ChildGuard:
        """Start the guard.

        Args:
            lock: a file locked as long as the guard lives, hence until the last child is gone: two servers never
                use one folder, and the successor of a killed process waits until its server has stopped.
        """
        with contextlib.ExitStack() as stack:
            lock_fds = (stack.enter_context(await lock_file(lock)).fileno(),) if lock else ()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "live_migration.common.supervisor"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=lock_fds,
                start_new_session=True,
                cwd="/",
            )
        assert process.stdin is not None
        guard = cls(process, process.stdin)
        assert process.stdout is not None
        try:
            is_ready = await asyncio.to_thread(process.stdout.readline)
        except BaseException:
            process.stdin.close()
            raise
        if not is_ready:
            await guard.close()
            raise LocalServerError("The guard process that would stop our servers does not start.")
        return guard

    def make_folder(self, prefix: str) -> Path:
        """Make an empty temporary folder, for us alone, which the guard removes."""
        path = Path(tempfile.gettempdir()).resolve() / f"{prefix}-{uuid.uuid4().hex}"
        self._tell(f"folder {path}")
        path.mkdir(mode=0o700)
        return path

    def spawn(
        self,
        arguments: Sequence[str | Path],
        *,
        stop: StopOrder,
        log: Path,
        cwd: Path,
        environment: Mapping[str, str],
        account: pwd.struct_passwd | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own, its output appended to `log`; the pid is the program's."""
        with log.open("ab") as output:
            return subprocess.Popen(
                ["/bin/sh", "-c", _ANNOUNCE_AND_EXEC, str(stop), *map(str, arguments)],
                stdin=self._to_guard,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=dict(environment),
                start_new_session=True,
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
            )

    async def close(self) -> None:
        """Stop the children and remove the folders; when cancelled, the guard goes on with it alone."""
        with contextlib.suppress(BrokenPipeError):
            self._to_guard.close()
        await wait_for_exit(self._process)
        if self._process.stdout:
            self._process.stdout.close()

    def _tell(self, line: str) -> None:
        try:
            self._to_guard.write(f"{line}\n".encode())
            self._to_guard.flush()
        except BrokenPipeError as error:
            raise LocalServerError("The guard process that would stop our servers is gone.") from error


async def lock_file(path: Path, *, patience: float = _LOCK_TIMEOUT_SECONDS) -> IO[bytes]:
    """Open and lock a file until it is closed, waiting for the guard of a process that was killed just now.

    Raises:
        LocalServerError: it is locked for longer than `patience` seconds.
    """
    file = path.open("wb")
    try:
        async with asyncio.timeout(patience):
            while not _try_lock(file):
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        file.close()
        hint = "Stop the program that uses it, or choose another folder."
        raise LocalServerError(f"A server is running on {path.parent} already.", hint=hint) from error
    except BaseException:
        file.close()
        raise
    return file


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def wait_for_exit(process: subprocess.Popen[bytes], *, timeout_seconds: float | None = None) -> int:
    """Wait for the end of a child and return its code; unlike asyncio's own, not bound to the loop that started it.

    Raises:
        TimeoutError: it still runs.
    """
    async with asyncio.timeout(timeout_seconds):
        while (code := process.poll()) is None:
            await asyncio.sleep(0.01)
        return code


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and to all below it, which would otherwise go on without their parent."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def is_port_free(port: int) -> bool:
    """Tell whether nobody listens on this port of 127.0.0.1."""
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
        return True


def free_port(*, besides: frozenset[int] = frozenset()) -> int:
    """Return a port of 127.0.0.1 that nobody listens on just now."""
    for port in random.sample(_PORTS, 200):
        if port not in besides and is_port_free(port):
            return port
    raise LocalServerError(f"No free port found between {_PORTS.start} and {_PORTS.stop}.")


def log_tail(path: Path, *, line_count: int = 15) -> str:
    """Return the last lines of a log, for an error message."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-line_count:])
    except FileNotFoundError:
        return "(it wrote no log)"


def user_cache_folder() -> Path:
    """Return the folder for what we downloaded, which lasts; a temporary one where there is no home to write to."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "live-migration"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return shared_cache_folder()
    return folder


def shared_cache_folder() -> Path:
    """Return a folder of ours that every user of this machine can read and nobody else can write.

    Raises:
        LocalServerError: somebody else made it before us, and could put programs of theirs into it.
    """
    folder = Path(tempfile.gettempdir()).resolve() / f"live-migration-{version('live-migration')}-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise LocalServerError(f"{folder} is not a folder of ours.", hint="Remove it, or set TMPDIR to another folder.")
    folder.chmod(0o755)
    return folder


def fill_once(target: Path, fill: Callable[[Path], None]) -> Path:
    """Return the folder `target`, filled by `fill` the first time; safe among processes and against being killed.

    Args:
        fill: fills the empty folder that it is given, which is renamed to `target` afterwards.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_name(f".{target.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(target)
    return target


def download_jars(coordinates: Sequence[str], folder: Path, *, transitive: bool = True) -> None:
    """Put the jars of these Maven coordinates, and by default what they need at run time, into a folder.

    The first one decides about the version of what several need. The user's local Maven repository is not touched: an interrupted download stays in it as a broken jar for ever.
    Nor is `jgo.build` used, which downloads a JDK to sort jars from modules; we put both on the class path.
    """
    from jgo.maven import MavenContext  # of the extra `local`, which a producer or consumer alone goes without

    with tempfile.TemporaryDirectory(dir=folder) as repository:
        context = MavenContext(repo_cache=Path(repository), local_repos=[], timeout=60)
        chosen: dict[tuple[str, str], Artifact] = {}
        for coordinate in coordinates:
            for artifact in _resolve(context, coordinate, transitive=transitive):
                chosen.setdefault((artifact.groupId, artifact.artifactId), artifact)

        def download(artifact: Artifact) -> None:
            shutil.copyfile(artifact.resolve(), folder / artifact.filename)

        with ThreadPoolExecutor(max_workers=6) as pool:
            list(pool.map(download, chosen.values()))


def _resolve(context: MavenContext, coordinate: str, *, transitive: bool) -> list[Artifact]:
    """List the artifacts of one coordinate.

    Never several at once: jgo lets what one of them manages override versions that another one needs, and a broker
    with the clients of another version is what comes of it.
    """
    dependency = context.create_dependency(coordinate)
    dependency.scope = "compile"
    inputs, others = context.resolver.resolve([dependency], transitive=transitive)
    needed = [each for each in others if transitive and each.scope in ("compile", "runtime")]
    return [each.artifact for each in (*inputs, *needed)]


@dataclass(frozen=True, slots=True)
class _Child:
    process: psutil.Process  # knows its start time, so that a later process with the same pid is not touched
    stop: StopOrder

    def is_running(self) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        return False

    def end(self) -> None:
        """Return when the child is gone; its parent, or init, has yet to collect it."""
        for each in self.stop.signals:
            if not self.is_running():
                return
            with contextlib.suppress(psutil.NoSuchProcess):
                self.process.send_signal(each)
            self._await_exit(self.stop.grace_seconds)
        if self.is_running():
            kill_tree(self.process.pid)
            self._await_exit(self.stop.grace_seconds)

    def _await_exit(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.01)


def guard(orders: IO[str]) -> None:
    """Note children and folders until `orders` ends, then stop and remove them."""
    children: list[_Child] = []
    folders: list[Path] = []
    for line in orders:
        match line.rstrip("\n").split(" "):
            case ["child", pid, signals, grace_seconds]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    children.append(_Child(psutil.Process(int(pid)), StopOrder.parse(signals, grace_seconds)))
            case ["folder", *words]:
                folders.append(Path(" ".join(words)))
    for child in reversed(children):
        child.end()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run the guard; what ends our parent, ctrl-C or a closed terminal, must not end it too."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    print("ready", flush=True)
    guard(sys.stdin)


if __name__ == "__main__":
    main()
