"""The schema's second part: what of the archive's post-data is run when, and the indexes of partitioned roots. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from live_migration.coordinator.dump_script import PG_CLASS, PG_CONSTRAINT, Entry


@dataclass(frozen=True, slots=True)
class PostData:
    """The post-data entries by the time at which they are run, each in the archive's order.

    `partitioned`: indexes of partitioned roots and of unlogged partitions, and all attachments, after the other leaves have theirs.
    `main`: rules, triggers, policies, publications and all else, at the cutover before the foreign keys.
    `last`: after the foreign keys: comments on constraints, event triggers.
    Left out are indexes that consumers build, foreign keys, and what is ours.
    """

    partitioned: tuple[Entry, ...]
    main: tuple[Entry, ...]
    last: tuple[Entry, ...]


def sort_post_data(
    entries: Sequence[Entry],
    *,
    built: Collection[tuple[int, int]],
    roots: Collection[tuple[int, int]],
    ours: Collection[tuple[int, int]],
) -> PostData:
    """Sort the entries.

    Args:
        built: (catalog, oid) of index and constraint entries that consumers build.
        roots: the same, of partitioned tables and their unlogged partitions.
        ours: (catalog, oid) of our publications and their members.
    """
    partitioned: list[Entry] = []
    main: list[Entry] = []
    last: list[Entry] = []
    for entry in entries:
        key = (entry.catalog, entry.oid)
        if (
            entry.type == "FK CONSTRAINT"
            or key in ours
            or (key in built and entry.catalog in (PG_CLASS, PG_CONSTRAINT))
        ):
            continue
        if entry.type == "INDEX ATTACH" or key in roots:
            partitioned.append(entry)
        elif entry.type == "EVENT TRIGGER" or _is_of_last(entry):
            last.append(entry)
        else:
            main.append(entry)
    # Event triggers would fire for what comes after them.
    last.sort(key=lambda entry: "EVENT TRIGGER" in (entry.type, entry.name[:13]))
    return PostData(tuple(partitioned), tuple(main), tuple(last))


def _is_of_last(entry: Entry) -> bool:
    return entry.type == "COMMENT" and entry.name.startswith(("CONSTRAINT ", "EVENT TRIGGER "))
