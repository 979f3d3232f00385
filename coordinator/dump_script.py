"""The SQL script that `pg_restore --verbose --file` writes, cut into the entries of the archive. Pure.

Each entry begins with a comment that names the catalog row it came from:

    --
    -- TOC entry 3422 (class 1259 OID 16964)
    -- Dependencies: 240 240
    -- Name: ident_idx; Type: INDEX; Schema: app; Owner: -
    -- Data Pos: 0
    --

The same text may stand inside a function's body or a comment's string, so quotes are followed. Statements that set a
default between entries are attached to the entries that they hold for; what only psql understands is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from live_migration.common.errors import FormatError

PG_CLASS = 1259
PG_CONSTRAINT = 2606
PG_TRIGGER = 2620
PG_PUBLICATION = 6104
PG_PUBLICATION_REL = 6106
PG_PUBLICATION_NAMESPACE = 6237


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of an archive. (`catalog`, `oid`) is the source's catalog row, (0, 0) where there is none.

    `defaults` are the settings that hold for it, such as `default_table_access_method`. `number`: its own in the archive; `needs`:
    those of the entries that it depends on, of a comment that which it is on.
    """

    catalog: int
    oid: int
    name: str
    type: str
    schema: str
    statements: str
    defaults: tuple[tuple[str, str], ...] = ()
    number: int = 0
    needs: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """What people know it by."""
        return f"{self.type.lower()} {self.schema + '.' if self.schema != '-' else ''}{self.name}"


_HEADER = re.compile(
    r"--\n-- TOC entry (?P<number>\d+) \(class (?P<catalog>\d+) OID (?P<oid>\d+)\)\n"
    r"(?:-- Dependencies: (?P<needs>[^\n]*)\n)?"
    r"-- Name: (?P<name>[^\n]*); Type: (?P<type>[^;\n]*); Schema: (?P<schema>[^\n]*?); Owner: [^\n]*\n"
    r"(?:-- Data Pos: [^\n]*\n)?--\n"
)
_TOKEN = re.compile(
    r"""(?P<string>(?<![\w$])[eE]'[^'\\]*(?:(?:\\.|'')[^'\\]*)*' | '[^']*(?:''[^']*)*')
      | (?P<identifier>"[^"]*(?:""[^"]*)*")
      | (?P<dollar>(?<![\w$])\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$)
      | (?P<header>^--\n--\ TOC\ entry\ )
      | (?P<comment>--[^\n]*)
      | (?P<block>/\*)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_BLOCK_EDGE = re.compile(r"/\*|\*/")
_DEFAULT = re.compile(r"^SET (default_\w+) = ([^\n]*);$", re.MULTILINE)
_TRAILER = re.compile(
    r"^(?:-- Completed on [^\n]*|--\n-- PostgreSQL database dump complete\n--|\\unrestrict \w+)$", re.MULTILINE
)


def parse_script(script: str) -> list[Entry]:
    """Cut a script into its entries, in order.

    Raises:
        FormatError: an entry's head is not as pg_restore 14 to 18 writes it.
    """
    starts = list(_entry_starts(script))
    entries = []
    defaults: dict[str, str] = {}
    defaults.update(_DEFAULT.findall(script[: starts[0]] if starts else script))
    for start, end in pairwise([*starts, len(script)]):
        header = _HEADER.match(script, start)
        if header is None:
            head = script[start : start + 200].splitlines()[:5]
            raise FormatError(f"pg_restore's script has an entry that cannot be read: {head}")
        body, own = _split_trailer(script[header.end() : end], is_last=end == len(script))
        entries.append(
            Entry(
                int(header["catalog"]),
                int(header["oid"]),
                header["name"],
                header["type"],
                header["schema"],
                body.strip(),
                tuple(defaults.items()),
                int(header["number"]),
                tuple(map(int, (header["needs"] or "").split())),
            )
        )
        defaults.update(own)
    return entries


def _split_trailer(text: str, *, is_last: bool) -> tuple[str, list[tuple[str, str]]]:
    """Part an entry's statements from the defaults that pg_restore sets after them, for the next entry.

    They stand at the very end, each in a paragraph of its own, so nothing inside quotes is taken for them.
    """
    if is_last:
        found = list(_TRAILER.finditer(text))
        if found:
            text = text[: found[0].start()]
    own: list[tuple[str, str]] = []
    lines = text.rstrip().split("\n")
    while lines and (setting := _DEFAULT.fullmatch(lines[-1])):
        own.insert(0, (setting[1], setting[2]))
        lines.pop()
        while lines and not lines[-1].strip():
            lines.pop()
    return "\n".join(lines), own


def _entry_starts(script: str) -> Iterator[int]:
    at = 0
    while token := _TOKEN.search(script, at):
        if token["header"]:
            yield token.start()
            header = _HEADER.match(script, token.start())
            at = header.end() if header else token.end()
        elif token["block"]:
            at = _block_end(script, token.end())
        else:
            at = token.end()


def _block_end(script: str, at: int) -> int:
    """Give the end of a block comment, which may hold others."""
    depth = 1
    while depth and (edge := _BLOCK_EDGE.search(script, at)):
        depth += 1 if edge[0] == "/*" else -1
        at = edge.end()
    return at if not depth else len(script)
