"""Locales of databases as each version's catalog names them, and settings by name alone."""

from __future__ import annotations

import pytest

from live_migration.coordinator.database_findings import SessionSetting, assess_locales, assess_settings, read_locale

LIBC = {"datcollate": "en_US.UTF-8", "datctype": "en_US.UTF-8"}
OF_14 = dict(LIBC)
OF_15 = {**LIBC, "datlocprovider": "c", "daticulocale": None, "datcollversion": "2.31"}
OF_18 = {**LIBC, "datlocprovider": "c", "datlocale": None, "daticurules": None, "datcollversion": "2.36"}


def fields(ours: dict[str, str | None], theirs: dict[str, str | None]) -> list[str]:
    found = assess_locales(read_locale(ours), read_locale(theirs))
    assert all(finding.level == "warning" and finding.hint for finding in found)
    return [finding.what.removeprefix("the target's database has another ").split(" than ")[0] for finding in found]


@pytest.mark.parametrize("ours", [OF_14, OF_15, OF_18])
@pytest.mark.parametrize(
    "theirs", [OF_14, OF_15, OF_18, {**OF_18, "datcollate": "en_US.utf8", "datctype": "en_US.utf8"}]
)
def test_the_same_locale_is_the_same_in_every_version(
    ours: dict[str, str | None], theirs: dict[str, str | None]
) -> None:
    assert fields(ours, theirs) == []


@pytest.mark.parametrize(
    ("theirs", "differs"),
    [
        ({**OF_14, "datcollate": "C"}, ["LC_COLLATE"]),
        ({**OF_14, "datctype": "C"}, ["LC_CTYPE"]),
        ({**OF_15, "datlocprovider": "i", "daticulocale": "en-US"}, ["locale provider", "ICU or builtin locale"]),
        ({**OF_18, "datlocprovider": "b", "datlocale": "C.UTF-8"}, ["locale provider", "ICU or builtin locale"]),
    ],
)
def test_each_field_that_differs_is_named(theirs: dict[str, str | None], differs: list[str]) -> None:
    assert fields(OF_14, theirs) == differs
    assert fields(theirs, OF_14) == differs


def test_icu_locales_and_rules_are_compared_whatever_their_column_is_called() -> None:
    old = {**OF_15, "datlocprovider": "i", "daticulocale": "de-DE"}
    new = {**OF_18, "datlocprovider": "i", "datlocale": "de-DE"}
    assert fields(old, new) == []
    assert fields(old, {**new, "datlocale": "sv-SE"}) == ["ICU or builtin locale"]
    assert fields(old, {**new, "daticurules": "&a < g"}) == ["ICU rules"]


def test_versions_of_the_library_that_orders_text_are_compared() -> None:
    (finding,) = assess_locales(read_locale(OF_15, "2.31"), read_locale(OF_15, "2.36"))
    assert finding.what.startswith(
        "the target's database has another collation version than the source's: 2.36, not 2.31: ORDER BY"
    )
    assert assess_locales(read_locale(OF_14, "2.36"), read_locale(OF_18, "2.36")) == []


def test_what_a_field_changes_is_said() -> None:
    collate, ctype = assess_locales(read_locale(OF_14), read_locale({"datcollate": "C", "datctype": "C"}))
    assert "en_US.UTF-8" in collate.what
    assert "ORDER BY" in collate.what
    assert "lower()" in ctype.what
    assert "unique indexes" in ctype.what
    assert "generated columns" in ctype.what


def test_settings_are_listed_without_their_values_where_the_target_has_them_not() -> None:
    ours = [SessionSetting(None, "app.secret=s3cret"), SessionSetting(None, "work_mem=4MB"), SessionSetting("r", "a=b")]
    (found,) = assess_settings(ours, [SessionSetting(None, "work_mem=4MB"), SessionSetting("other", "a=b")])
    assert found.level == "warning"
    assert "app.secret, a (role r)" in found.what
    assert "s3cret" not in found.what
    assert "work_mem" not in found.what
    assert assess_settings(ours, ours) == []
    assert assess_settings([], ours) == []
