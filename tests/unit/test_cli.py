from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from live_migration.common.errors import LiveMigrationError, SourceError, UsageError
from live_migration.common.settings import Settings
from live_migration.coordinator import commands as module
from live_migration.coordinator.cli import allocator, without_secrets
from live_migration.coordinator.commands import commands, run
from live_migration.coordinator.options import variable

SECRET = "s3cret-Pa55"
URI = f"postgresql://u:{SECRET}@127.0.0.1:1/d"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in ("SOURCE", "TARGET", "KAFKA") or name.startswith("LIVE_MIGRATION_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("arguments", "visible", "hidden"),
    [
        (["status"], ["status"], {}),
        (["migrate", "--source", URI, "--name", "n"], ["migrate", "--name", "n"], {"SOURCE": URI}),
        (["migrate", f"--target={URI}", "--json"], ["migrate", "--json"], {"TARGET": URI}),
        (["producer", "--kafka-password", "x=y"], ["producer"], {"LIVE_MIGRATION_KAFKA_PASSWORD": "x=y"}),
        (["producer", "--kafka-password=x=y"], ["producer"], {"LIVE_MIGRATION_KAFKA_PASSWORD": "x=y"}),
        (["migrate", "--source"], ["migrate", "--source"], {}),
        (["migrate", "--source", URI, "--source=b"], ["migrate"], {"SOURCE": "b"}),
    ],
)
def test_secrets_go_from_arguments_into_the_environment(
    arguments: list[str], visible: list[str], hidden: dict[str, str]
) -> None:
    assert without_secrets(arguments) == (visible, hidden)


@pytest.mark.parametrize(
    ("arguments", "environment", "added"),
    [
        (["consumer", "--name", "n"], {}, {"PYTHONMALLOC": "malloc"}),
        (["consumer"], {"PYTHONMALLOC": ""}, {"PYTHONMALLOC": "malloc"}),
        (["consumer"], {"PYTHONMALLOC": "pymalloc"}, {}),
        (["consumer"], {"PYTHONMALLOC": "malloc"}, {}),
        (["producer"], {}, {}),
        (["migrate", "--consumers", "2"], {}, {}),
    ],
)
def test_consumers_use_the_allocator_of_the_c_library(
    arguments: list[str], environment: dict[str, str], added: dict[str, str]
) -> None:
    assert allocator(arguments, environment) == added


@pytest.mark.parametrize("flag", ["-v", "--version"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([flag]) == 0
    assert capsys.readouterr().out.startswith("live-migration, version ")


def test_every_command_of_the_design_is_there() -> None:
    assert set(commands.commands) == {
        "validate", "migrate", "status", "cutover", "skip", "verify", "clean", "producer", "consumer", "tail", "demo",
    }  # fmt: skip


def test_every_setting_is_an_option_of_migrate_and_names_its_variable() -> None:
    options = {p.name: p for p in commands.commands["migrate"].params if isinstance(p, click.Option)}
    assert set(options) == set(Settings.model_fields) | {"recopy"}
    options.pop("recopy")  # a word for once, and no setting
    for name, option in options.items():
        assert f"[env: {variable(name)}]" in (option.help or "")


@pytest.mark.parametrize("command", sorted(commands.commands))
def test_each_command_has_help(command: str) -> None:
    result = CliRunner().invoke(commands, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command"),
        (["migrate", "--nonsense"], "No such option"),
        (["migrate", "--partitions", "many"], "not a valid integer"),
        (["migrate", "--source"], "requires an argument"),
        (["migrate"], "no source is given"),
        (["migrate", "--source", URI], "no target is given"),
        (["validate", "--source", URI], "no target is given"),
        (["verify", "--target", URI], "no source is given"),
        (["cutover"], "no target is given"),
        (["status"], "no target is given"),
        (["clean", "--source", URI], "no target is given"),
        (["producer", "--source", URI], "no broker is given"),
        (["consumer", "--source", URI, "--target", URI], "no broker is given"),
        (["tail"], "neither a broker nor a target"),
        (["migrate", "--source", URI, "--target", URI, "--partitions", "0"], "partitions"),
        (["migrate", "--source", URI, "--target", URI, "--name", "No-Good"], "name"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    streams = capsys.readouterr()
    assert said in streams.err
    assert streams.out == ""
    assert SECRET not in streams.err
    assert "Traceback" not in streams.err


@pytest.mark.parametrize("command", ["status", "cutover", "verify", "validate", "clean", "migrate"])
def test_server_that_cannot_be_reached_is_one_message_with_the_next_step(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVE_MIGRATION_DIR", str(tmp_path))
    monkeypatch.setenv("KAFKA", "127.0.0.1:1")
    monkeypatch.setenv("SOURCE", URI)
    monkeypatch.setenv("TARGET", URI)
    assert run([command]) == 1
    streams = capsys.readouterr()
    assert "127.0.0.1:1/d" in streams.err
    assert "Traceback" not in streams.err
    assert SECRET not in streams.err
    assert streams.out == ""


def fail_with(error: BaseException) -> Callable[..., int]:
    def fail(**options: object) -> int:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SourceError("slot gone", hint="start again"), 1, "error: slot gone\n  next: start again\n"),
        (UsageError("bad words"), 2, "error: bad words\n"),
        (ExceptionGroup("g", [ExceptionGroup("h", [SourceError("inner")])]), 1, "error: inner\n"),
        (click.Abort(), 130, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands.commands["demo"], "callback", fail_with(error))
    assert run(["demo"]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ValueError("bug"), ExceptionGroup("g", [ValueError("bug"), LiveMigrationError("x")])]
)
def test_unexpected_error_is_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.commands["demo"], "callback", fail_with(error))
    with pytest.raises(type(error)):
        run(["demo"])


def test_log_level_of_services_is_info_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[str] = []
    monkeypatch.setattr(module, "configure_logging", lambda level, json: levels.append(level))
    monkeypatch.setattr(module, "_run", lambda work: work.close())
    common = ["--source", URI, "--kafka", "h:1"]
    assert run(["producer", *common]) == 0
    assert run(["producer", *common, "--log-level", "debug"]) == 0
    monkeypatch.setenv("LIVE_MIGRATION_LOG_LEVEL", "error")
    assert run(["producer", *common]) == 0
    assert levels == ["info", "debug", "error"]


def test_secrets_are_not_in_the_process_list() -> None:
    """The process that runs the command has other arguments than it was started with."""
    security = ("--kafka-security-protocol", "SASL_PLAINTEXT", "--kafka-username", "me")
    with started(
        "producer", "--source", URI, f"--kafka-password={SECRET}", "--kafka", "127.0.0.1:1", *security
    ) as process:
        wait_until(process, lambda: "producer" in (line := read_command_line(process.pid)) and SECRET not in line)
        assert "--kafka-username" in read_command_line(process.pid)
        assert URI.encode() in Path(f"/proc/{process.pid}/environ").read_bytes()


@pytest.mark.parametrize("chosen", [None, "pymalloc"])
def test_a_consumer_runs_with_the_allocator_of_the_c_library(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any secret among its arguments, too; a process's environment in /proc is the one that it began with."""
    monkeypatch.delenv("PYTHONMALLOC", raising=False)
    if chosen:
        monkeypatch.setenv("PYTHONMALLOC", chosen)
    monkeypatch.setenv("SOURCE", URI)
    monkeypatch.setenv("TARGET", URI)
    expected = f"PYTHONMALLOC={chosen or 'malloc'}".encode()
    with started("consumer", "--kafka", "127.0.0.1:1") as process:
        wait_until(process, lambda: expected in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"))
        assert "consumer" in read_command_line(process.pid)


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The program, until the block ends; nothing that it says may hold the secret."""
    with subprocess.Popen(
        [sys.executable, "-m", "live_migration.coordinator.cli", *arguments], stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            errors = process.communicate()[1]
    assert SECRET.encode() not in errors


def wait_until(process: subprocess.Popen[bytes], is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, read_command_line(process.pid)
        time.sleep(0.01)


def read_command_line(pid: int) -> str:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""
