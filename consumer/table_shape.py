"""Whether the target's table can take the source's rows, and the statements that mend it where it cannot. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from live_migration.common.catalog import ColumnInfo
from live_migration.common.relation import quote_identifier


@dataclass(frozen=True, slots=True)
class ColumnDefinition:
    """A column with all that ALTER TABLE needs to make it.

    `collation`: quoted, '' for the type's own. `expression`: of the default, or what generates the column; else ''.
    `is_inherited`: from a parent or partitioned table, where alone it can be altered.
    """

    info: ColumnInfo
    collation: str = ""
    expression: str = ""
    is_inherited: bool = False

    @property
    def name(self) -> str:
        return self.info.name


def copied_columns(columns: Sequence[ColumnDefinition]) -> tuple[ColumnInfo, ...]:
    """Give the columns that carry data of their own, in order."""
    return tuple(column.info for column in columns if not column.info.generated)


def travels_binary(source: Sequence[ColumnDefinition], target: Sequence[ColumnDefinition]) -> bool:
    """Tell whether rows may be copied in binary form: the same built-in type under the same name on both sides."""
    target_types = {column.name: column.info.type_oid for column in target}
    return all(
        column.is_binary_safe and target_types.get(column.name) == column.type_oid for column in copied_columns(source)
    )


def find_differences(source: Sequence[ColumnDefinition], target: Sequence[ColumnDefinition]) -> tuple[str, ...]:
    """Say in words where the target's table differs so that it cannot take the source's rows."""
    theirs = {column.name: column.info for column in target}
    ours = {column.name for column in source}
    found = []
    for column in (column.info for column in source):
        there = theirs.get(column.name)
        if there is None:
            found.append(f"column {column.name} ({column.type}) is missing on the target")
        elif there.type != column.type:
            found.append(f"column {column.name} is {column.type} on the source, {there.type} on the target")
        elif bool(there.generated) != bool(column.generated):
            found.append(f"column {column.name} is generated on the {'source' if column.generated else 'target'} only")
        elif there.not_null and not column.not_null and not column.generated:
            found.append(f"column {column.name} may be null on the source, not on the target")
    found += [f"column {column.name} is not on the source" for column in target if column.name not in ours]
    return tuple(found)


def mending_statements(
    table_sql: str, root_sql: str, source: Sequence[ColumnDefinition], target: Sequence[ColumnDefinition]
) -> tuple[str, ...]:
    """Give the ALTER TABLE statements that make the target's table take the source's rows, in the order to run them.

    Args:
        table_sql: the table's name, quoted.
        root_sql: that of the table which its columns are inherited from.
        source, target: their columns.
    """
    theirs = {column.name: column for column in target}
    ours = {column.name: column for column in source}
    remade = _remade(source, theirs)
    missing = [column for column in source if column.name not in theirs]
    extra = [column for column in target if column.name not in ours]
    statements: list[tuple[ColumnDefinition, str]] = []
    if len(missing) == len(extra) == 1 and _is_renamed(missing[0], extra[0]):
        old, new = quote_identifier(extra[0].name), quote_identifier(missing[0].name)
        statements.append((extra[0], f"RENAME COLUMN {old} TO {new}"))
        missing, extra = [], []
    dropped = sorted(
        [*extra, *(theirs[column.name] for column in remade)], key=lambda column: not column.info.generated
    )
    statements += [(column, f"DROP COLUMN {quote_identifier(column.name)}") for column in dropped]
    for column in source:
        if column.name in theirs and column not in remade:
            statements.append((theirs[column.name], ", ".join(_changes(column, theirs[column.name]))))
    added = sorted([*missing, *remade], key=lambda column: bool(column.info.generated))
    statements += [(column, f"ADD COLUMN {column_definition(column)}") for column in added]
    return tuple(
        f"ALTER TABLE {root_sql if column.is_inherited else table_sql} {actions};"
        for column, actions in statements
        if actions
    )


def _remade(source: Sequence[ColumnDefinition], theirs: Mapping[str, ColumnDefinition]) -> list[ColumnDefinition]:
    """Give the columns to be dropped and added anew: generated ones, which also stand in the way of other columns' types."""
    both = [(column, theirs[column.name]) for column in source if column.name in theirs]
    is_retyped = any(ours.info.type != other.info.type for ours, other in both)
    return [
        ours
        for ours, other in both
        if bool(ours.info.generated) != bool(other.info.generated) or (ours.info.generated and is_retyped)
    ]


def _is_renamed(missing: ColumnDefinition, extra: ColumnDefinition) -> bool:
    return missing.info.type == extra.info.type and not missing.info.generated and not extra.info.generated


def _changes(source: ColumnDefinition, target: ColumnDefinition) -> list[str]:
    """Give the actions, of one ALTER TABLE, that turn a column of the target into the source's."""
    name = quote_identifier(source.name)
    actions = []
    if source.info.type != target.info.type:
        if target.expression:
            actions.append(f"ALTER COLUMN {name} DROP DEFAULT")
        collation = f" COLLATE {source.collation}" if source.collation else ""
        actions.append(f"ALTER COLUMN {name} TYPE {source.info.type}{collation} USING {name}::text::{source.info.type}")
        if source.expression:
            actions.append(f"ALTER COLUMN {name} SET DEFAULT {source.expression}")
    if target.info.not_null and not source.info.not_null and not source.info.generated:
        actions.append(f"ALTER COLUMN {name} DROP NOT NULL")
    return actions


_GENERATED = {"s": "STORED", "v": "VIRTUAL"}
_IDENTITY = {"a": "ALWAYS", "d": "BY DEFAULT"}


def column_definition(column: ColumnDefinition) -> str:
    """Give a column as ADD COLUMN has it."""
    info = column.info
    words = [quote_identifier(info.name), info.type]
    if column.collation:
        words.append(f"COLLATE {column.collation}")
    if info.generated:
        words.append(f"GENERATED ALWAYS AS ({column.expression}) {_GENERATED[info.generated]}")
    elif info.identity:
        words.append(f"GENERATED {_IDENTITY[info.identity]} AS IDENTITY")
    elif column.expression:
        words.append(f"DEFAULT {column.expression}")
    if info.not_null:
        words.append("NOT NULL")
    return " ".join(words)
