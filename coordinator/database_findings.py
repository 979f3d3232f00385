"""What belongs to a database as a whole and is not carried over: its locale, and the settings that sessions get in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.collations import plain_locale, read_collation_version
from live_migration.common.progress import name_list
from live_migration.coordinator.findings import Finding, warning

# As JSON: the columns of the locale came one by one, and one was renamed, with 15, 16 and 17.
_DATABASE = "select to_jsonb(d) - 'datacl' from pg_database d where datname = current_database()"

_SETTINGS = """
    select r.rolname::text as role, c as setting
    from pg_db_role_setting s cross join unnest(s.setconfig) c left join pg_roles r on r.oid = s.setrole
    where s.setdatabase = (select oid from pg_database where datname = current_database())
    order by r.rolname nulls first, c
"""

_PROVIDERS = {"c": "libc", "i": "icu", "b": "builtin"}
_ORDER = "ORDER BY, min() and max(), comparisons by < and >, and with them CHECK constraints and bounds of partitions, give other results for text"
_CASE = (
    "lower(), upper(), ILIKE and classes of characters in regular expressions give other results for what is not ASCII: unique indexes on such "
    "expressions may refuse rows that the source holds, and generated columns get other values"
)
_CONSEQUENCES = {
    "locale provider": f"{_ORDER}; {_CASE}",
    "LC_COLLATE": _ORDER,
    "LC_CTYPE": _CASE,
    "ICU or builtin locale": f"{_ORDER}; {_CASE}",
    "ICU rules": _ORDER,
    "collation version": _ORDER,
}


@dataclass(frozen=True, slots=True)
class SessionSetting:
    """What ALTER DATABASE … SET, or of a `role` ALTER ROLE … IN DATABASE … SET, has set. `setting`: as `name=value`."""

    role: str | None
    setting: str

    def __str__(self) -> str:
        name = self.setting.partition("=")[0]  # a value may be a secret
        return f"{name} (role {self.role})" if self.role else name


def read_locale(database: Mapping[str, str | None], version: str | None = None) -> dict[str, str]:
    """Give the fields of a database's locale, from its row in pg_database of whatever version, as people name them.

    `version`: that which the library (glibc, ICU) that orders text has by now, if it has one.
    """
    provider = database.get("datlocprovider") or "c"
    return {
        "locale provider": _PROVIDERS.get(provider, provider),
        "LC_COLLATE": database.get("datcollate") or "",
        "LC_CTYPE": database.get("datctype") or "",
        "ICU or builtin locale": database.get("datlocale") or database.get("daticulocale") or "",
        "ICU rules": database.get("daticurules") or "",
        "collation version": version or "",
    }


def assess_locales(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[Finding]:
    """Warn of each field in which the target's locale is another, with what changes by it."""
    return [
        warning(
            f"the target's database has another {field} than the source's: {theirs[field] or 'none'}, not {value or 'none'}: "
            f"{_CONSEQUENCES[field]}",
            "Make the target's database anew with the source's (`create database … template template0 …`), or see that nobody depends on it.",
        )
        for field, value in ours.items()
        if plain_locale(value) != plain_locale(theirs[field])
    ]


def assess_settings(ours: Sequence[SessionSetting], theirs: Sequence[SessionSetting]) -> list[Finding]:
    """Warn of settings of the source's database that the target's has not, or otherwise; by name alone."""
    missing = [each for each in ours if each not in theirs]
    if not missing:
        return []
    names = name_list(missing)
    return [
        warning(
            f"settings of the source's database (ALTER DATABASE … SET, ALTER ROLE … IN DATABASE … SET) are not carried over, and the target's has "
            f"them not, or otherwise: {names}",
            "Set on the target what the applications need: `select * from pg_db_role_setting` on the source shows them.",
        )
    ]


async def find_databases(source: asyncpg.Connection, target: asyncpg.Connection) -> list[Finding]:
    """Compare what belongs to either database as a whole."""
    locales, settings = [], []
    for connection in (source, target):
        row = json.loads(await connection.fetchval(_DATABASE))
        locales.append(read_locale(row, await read_collation_version(connection)))
        settings.append([SessionSetting(row["role"], row["setting"]) for row in await connection.fetch(_SETTINGS)])
    return assess_locales(*locales) + assess_settings(*settings)
