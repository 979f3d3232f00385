"""docs/configuration.md says what common/settings.py does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from live_migration.common.settings import Settings
from live_migration.coordinator.commands import commands

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEST_LINK = re.compile(r"\[`?([^`\]]+?)`?\]\(\.\./(?:\.\./)?(tests/[\w/]+\.py)\)")
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \| (.*?) \| (.+) \|$", re.MULTILINE)
ROWS = {row[0]: row[1:] for row in ROW.findall((DOCS / "configuration.md").read_text())}


def test_every_setting_is_described_once_in_the_order_of_the_code() -> None:
    names = [row[0] for row in ROW.findall((DOCS / "configuration.md").read_text())]
    assert names == list(Settings.model_fields)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_option_environment_and_default_are_those_of_the_code(name: str) -> None:
    option, environment, default, _, meaning = ROWS[name]
    field = Settings.model_fields[name]
    words = name.replace("_", "-")
    is_negated = field.annotation is bool and field.default
    assert option == (f"`--{words}/--no-{words}`" if is_negated else f"`--{words}`")
    prefixed = f"LIVE_MIGRATION_{name.upper()}"
    has_short_name = field.validation_alias is not None
    assert environment == (f"`{name.upper()}` or `{prefixed}`" if has_short_name else f"`{prefixed}`")
    assert default == ("none" if field.default is None else f"`{field.default}`")
    assert meaning


def test_every_option_is_one_of_some_command() -> None:
    known = {word for command in commands.commands.values() for each in command.params for word in each.opts}
    known |= {word for command in commands.commands.values() for each in command.params for word in each.secondary_opts}
    documented = {word for option, *_ in ROWS.values() for word in option.strip("`").split("/")}
    assert documented - known == set()


PROMISES = [
    line
    for line in (DOCS / "delivery.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| promise", "| sentence"))
]


@pytest.mark.parametrize("page", sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")))
def test_a_linked_test_is_there_by_its_name(page: str) -> None:
    for name, path in TEST_LINK.findall((DOCS / page).read_text()):
        if (page != "delivery.md" and not name.startswith("test_")) or (
            name == Path(path).name and page != "delivery.md"
        ):
            assert (DOCS.parent / path).exists(), f"{page}: {path}"
            continue
        assert re.search(rf"^(async )?def {name}\(", (DOCS.parent / path).read_text(), re.MULTILINE), (
            f"{page}: {path}: {name}"
        )


@pytest.mark.parametrize("line", PROMISES)
def test_every_promise_of_delivery_names_the_test_that_breaks_something(line: str) -> None:
    assert TEST_LINK.search(line.split("|")[-2]), line


def test_every_paragraph_about_order_and_durability_names_its_tests() -> None:
    _, _, rest = (DOCS / "delivery.md").read_text().partition("## Order")
    paragraphs = [p for p in rest.split("\n\n")[1:] if not p.startswith(("#", "|"))]
    assert len(paragraphs) >= 5
    assert [p for p in paragraphs if not TEST_LINK.search(p)] == []


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (DOCS / page).read_text()):
        assert (DOCS / link).exists(), f"{page} links to {link}"


def test_architecture_names_files_that_are_there() -> None:
    folder = ""
    for line in (DOCS / "architecture.md").read_text().splitlines():
        if line.startswith("### "):
            folder = line.removeprefix("### ")
        for name in re.findall(r"`([\w/]+\.(?:py|sql))`", line) if folder and line.startswith("|") else ():
            assert (DOCS.parent / folder / name).exists(), f"{folder}{name}"


def test_architecture_names_every_table_of_the_state() -> None:
    made = re.findall(
        r"^create table _live_migration\.(\w+)", (DOCS.parent / "common/sql/state.sql").read_text(), re.MULTILINE
    )
    page = (DOCS / "architecture.md").read_text()
    assert made
    assert [table for table in made if f"| `{table}` |" not in page] == []
