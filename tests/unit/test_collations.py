"""Whether two databases order text alike, by what their catalogs say."""

from __future__ import annotations

import pytest

from live_migration.common.batch_order import other_orders
from live_migration.common.collations import TextOrder, order_of
from live_migration.common.relation import QualifiedName

LIBC = {"datcollate": "en_US.UTF-8"}
LIBC_18 = {"datlocprovider": "c", "datcollate": "en_US.utf8", "datlocale": None, "daticurules": None}
ICU_15 = {"datlocprovider": "i", "datcollate": "en_US.UTF-8", "daticulocale": "en-US"}
ICU_18 = {"datlocprovider": "i", "datcollate": "C", "datlocale": "en-US", "daticurules": None}
BUILTIN = {"datlocprovider": "b", "datcollate": "en_US.UTF-8", "datlocale": "C.UTF-8"}
POSIX = {"datlocprovider": "c", "datcollate": "POSIX"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((LIBC, "2.36", "UTF8"), (LIBC_18, "2.36", "UTF8")),
        ((LIBC, None, "UTF8"), (LIBC_18, None, "UTF8")),
        ((ICU_15, "153.80", "UTF8"), (ICU_18, "153.80", "UTF8")),
        ((BUILTIN, "1", "UTF8"), (POSIX, None, "UTF8")),
        ((POSIX, None, "LATIN1"), (POSIX, None, "UTF8")),
        (({"collprovider": "i", "collcollate": "de"}, "153", "UTF8"), ({"collprovider": "i", "colllocale": "de"}, "153", "UTF8")),
    ],
)  # fmt: skip
def test_orders_that_are_the_same(ours: tuple[dict[str, str | None], str, str], theirs: tuple[dict[str, str | None], str, str]) -> None:  # fmt: skip
    assert order_of(*ours) == order_of(*theirs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((LIBC, "2.36", "UTF8"), (LIBC, "2.39", "UTF8")),
        ((LIBC, "2.36", "UTF8"), (LIBC, None, "UTF8")),
        ((LIBC, "2.36", "UTF8"), (POSIX, None, "UTF8")),
        ((LIBC, "2.36", "UTF8"), ({"datcollate": "de_DE.UTF-8"}, "2.36", "UTF8")),
        ((ICU_18, "153", "UTF8"), (LIBC_18, "153", "UTF8")),
        ((ICU_18, "153", "UTF8"), ({**ICU_18, "daticurules": "&a < g"}, "153", "UTF8")),
        ((POSIX, None, "KOI8R"), (POSIX, None, "UTF8")),
        ((POSIX, None, "EUC_JP"), (BUILTIN, None, "UTF8")),
    ],
)
def test_orders_that_differ(ours: tuple[dict[str, str | None], str, str], theirs: tuple[dict[str, str | None], str, str]) -> None:  # fmt: skip
    assert order_of(*ours) != order_of(*theirs)


def test_a_collation_that_one_end_lacks_is_not_compared() -> None:
    own, both = QualifiedName("public", "own"), QualifiedName("pg_catalog", "de-x-icu")
    ours = {None: TextOrder("bytes", "UTF8"), own: TextOrder("i", "de"), both: TextOrder("i", "de", "", "153")}
    theirs = {None: TextOrder("bytes", "UTF8"), both: TextOrder("i", "de", "", "154")}
    assert other_orders([None, own, both], ours, theirs) == {both}
    assert other_orders([None, own], ours, theirs) == set()
