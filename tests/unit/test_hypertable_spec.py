from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from live_migration.common.errors import UsageError
from live_migration.common.relation import QualifiedName
from live_migration.common.settings import Settings, load_settings
from live_migration.coordinator.hypertable_spec import (
    DAY,
    HOUR,
    HypertableSpec,
    definition_of,
    format_interval,
    parse_interval,
    parse_spec,
    read_specs,
)

NAMES = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\n\r"), min_size=1, max_size=7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("public.metrics:time,1 day", (("public", "metrics"), "time", DAY, True, None, None)),
        ("metrics:time,12 hours", (("public", "metrics"), "time", 12 * HOUR, True, None, None)),
        (" S.M : Ts , 86400 , dev_id , 4 ", (("s", "m"), "ts", 86400, False, "dev_id", 4)),
        ('"S.x"."M""a:,":"T s",1 week,"É",2', (("S.x", 'M"a:,'), "T s", 7 * DAY, True, "É", 2)),
        ("Ärger:t,1 month", (("public", "Ärger"), "t", 30 * DAY, True, None, None)),
        ("a:t,1 day 6h", (("public", "a"), "t", DAY + 6 * HOUR, True, None, None)),
    ],
)
def test_what_a_word_says(text: str, expected: tuple[object, ...]) -> None:
    spec = parse_spec(text)
    (schema, name), *rest = expected  # type: ignore[misc]
    assert spec.name == QualifiedName(schema, name)
    assert [spec.column, spec.interval, spec.is_duration, spec.partition_column, spec.partitions] == rest


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot read"),
        ("metrics", "cannot read"),
        ("metrics:time", "cannot read"),
        ("metrics:time,1 day,device", "cannot read"),
        ("a.b.c:time,1 day", "cannot read"),
        ("metrics:time,1 fortnight", "'fortnight'"),
        ("metrics:time,often", "interval 'often'"),
        ("metrics:time,-1 day", "interval '-1 day'"),
        ("metrics:time,1.5 days", "interval '1.5 days'"),
        ("metrics:time,0 days", "interval: Input should be greater than 0"),
        ("metrics:time,99999999999999999999", "interval: Input should be less"),
        ("metrics:time,1 day,device,many", "partitions: Input should be a valid integer"),
        ("metrics:time,1 day,device,0", "partitions: Input should be greater"),
        ("metrics:time,1 day,device,40000", "partitions: Input should be less"),
        ("metrics:time,1 day,time,4", "cannot be both"),
        (f"{'x' * 64}:time,1 day", "longer than PostgreSQL's 63 bytes"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_spec(text)
    assert complaint in caught.value.message
    assert "schema.table:time_column" in caught.value.hint or "second to year" in caught.value.hint


@given(NAMES, NAMES, NAMES, NAMES, st.integers(1, 2**53), st.booleans(), st.booleans())
def test_a_written_one_reads_the_same(
    schema: str, table: str, column: str, space: str, interval: int, is_duration: bool, has_space: bool
) -> None:
    given_space = {"partition_column": f"{space}x{column}", "partitions": 3} if has_space else {}
    spec = HypertableSpec(
        name=QualifiedName(schema, table), column=column, interval=interval, is_duration=is_duration, **given_space
    )
    assert parse_spec(str(spec)) == spec


@given(st.integers(1, 2**62))
def test_intervals_read_as_they_are_written(microseconds: int) -> None:
    assert parse_interval(format_interval(microseconds), of="t") == (microseconds, True)


def test_words_and_file_together(tmp_path: Path) -> None:
    file = tmp_path / "tables"
    file.write_text("# big ones\n\npublic.a:t,1 day\n  # and\n b:n,1000,k,2\n", encoding="utf-8-sig")
    assert [str(spec) for spec in read_specs(["c:t,1 hour"], file)] == [
        "public.c:t,1 hour",
        "public.a:t,1 day",
        "public.b:n,1000,k,2",
    ]
    assert read_specs([], None) == ()


def test_everything_wrong_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "tables"
    file.write_text("public.a:t,1 day\nnonsense\n")
    with pytest.raises(UsageError) as caught:
        read_specs(["other"], file)
    assert "--hypertable: cannot read hypertable 'other'" in caught.value.message
    assert f"{file}:2: cannot read hypertable 'nonsense'" in caught.value.message
    with pytest.raises(UsageError, match=r"named twice: public\.a"):
        read_specs(['"a":x,5', "public.A:t,1 day"], None)
    with pytest.raises(UsageError, match="No such file"):
        read_specs([], tmp_path / "none")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_specs([], file)


def test_definition_has_the_types_of_the_columns() -> None:
    spec = parse_spec("a:t,1 day,k,2")
    hypertable = definition_of(spec, {"t": "date", "k": "text"})
    assert [(each.column, each.type, each.interval, each.partitions) for each in hypertable.dimensions] == [
        ("t", "date", DAY, None),
        ("k", "text", None, 2),
    ]


def test_settings_take_several_words_and_hand_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("a:t,1 day", '"B":n,5')
    settings = load_settings({"hypertable": words, "hypertables_file": Path("f")})
    assert settings.hypertable == words
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings
    monkeypatch.setenv("LIVE_MIGRATION_HYPERTABLE", "")
    assert Settings().hypertable == ()
