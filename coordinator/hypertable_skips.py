"""What users let go that hypertables cannot have: all of it, or keys and foreign keys one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from live_migration.common.errors import UsageError
from live_migration.common.relation import QualifiedName
from live_migration.common.settings import Settings
from live_migration.coordinator.hypertable_spec import parse_names, shown

_FORM = (
    "Write it as 'schema.table.name', e.g. 'public.orders.orders_pkey'; a foreign key's table is the one that refers."
)


@dataclass(frozen=True, slots=True, order=True)
class TableObject:
    """A key or a foreign key, by its table's name and its own."""

    table: QualifiedName
    name: str

    def __str__(self) -> str:
        """Give it as a user would write it."""
        return ".".join(map(shown, (self.table.schema, self.table.name, self.name)))


@dataclass(frozen=True, slots=True)
class Skips:
    """What is left out on the target. `everything`: whatever hypertables cannot have; else what is named."""

    everything: bool = False
    named: frozenset[TableObject] = frozenset()

    def has(self, table: QualifiedName, name: str) -> bool:
        return self.everything or TableObject(table, name) in self.named

    def unused(self, incompatible: Iterable[TableObject]) -> list[TableObject]:
        """Give what is named although hypertables can have it, or there is no such thing."""
        return sorted(self.named - set(incompatible))


def read_skips(settings: Settings) -> Skips:
    """Read what the settings say.

    Raises:
        UsageError: a name cannot be read.
    """
    named = frozenset(_parse(text) for text in settings.skip_hypertable_object)
    return Skips(settings.skip_hypertable_incompatible_objects, named)


def _parse(text: str) -> TableObject:
    names = parse_names(text)
    if len(names) not in (2, 3):
        raise UsageError(f"cannot read --skip-hypertable-object '{text}'", hint=_FORM)
    *schema, table, name = names
    return TableObject(QualifiedName(schema[0] if schema else "public", table), name)
