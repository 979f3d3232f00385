from __future__ import annotations

from pathlib import Path

import pytest

from live_migration.common.errors import UsageError
from live_migration.common.settings import MIB, Settings, load_settings

URI = "postgresql://u:s3cret@h:5432/d"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SOURCE",
        "TARGET",
        "KAFKA",
        "LIVE_MIGRATION_SOURCE",
        "LIVE_MIGRATION_NAME",
        "LIVE_MIGRATION_PARTITIONS",
    ):
        monkeypatch.delenv(name, raising=False)


def test_defaults_need_nothing() -> None:
    settings = load_settings({})
    assert (settings.name, settings.partitions, settings.batch_bytes) == ("live_migration", 8, 16 * MIB)


@pytest.mark.parametrize("variable", ["SOURCE", "LIVE_MIGRATION_SOURCE"])
def test_source_comes_from_either_variable(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, URI)
    assert load_settings({}).source_uri() == URI


def test_option_wins_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE", "postgresql://other/d")
    monkeypatch.setenv("LIVE_MIGRATION_SOURCE", "postgresql://third/d")
    monkeypatch.setenv("LIVE_MIGRATION_PARTITIONS", "3")
    settings = load_settings({"source": URI, "partitions": 5})
    assert (settings.source_uri(), settings.partitions) == (URI, 5)


def test_option_that_is_not_given_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVE_MIGRATION_PARTITIONS", "3")
    assert load_settings({"partitions": None}).partitions == 3


def test_all_wrong_settings_are_named_at_once_without_their_values() -> None:
    with pytest.raises(UsageError) as caught:
        load_settings({"partitions": 0, "name": "No-Good", "consumers": "s3cret"})
    assert caught.value.exit_code == 2
    for name in ("partitions", "name", "consumers"):
        assert name in caught.value.message
    assert "s3cret" not in str(caught.value)
    assert "No-Good" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "A", "a-b", "a b", "é", "a" * 41])
def test_name_must_fit_a_slot(name: str) -> None:
    with pytest.raises(UsageError):
        load_settings({"name": name})


def test_what_is_missing_is_asked_for() -> None:
    settings = load_settings({})
    for ask in (settings.source_uri, settings.target_uri, settings.kafka_servers):
        with pytest.raises(UsageError) as caught:
            ask()
        assert caught.value.hint


def test_secrets_do_not_show() -> None:
    settings = load_settings({"source": URI, "target": URI, "kafka_password": "s3cret"})
    assert "s3cret" not in repr(settings)
    assert "s3cret" not in str(settings.model_dump(mode="json"))


def test_child_gets_the_same_settings_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(
        {
            "source": URI,
            "kafka": "h:1",
            "kafka_password": "p",
            "dir": Path("/d"),
            "workers": False,
            "name": "n",
            "memory": 9 * MIB,
        }
    )
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings
