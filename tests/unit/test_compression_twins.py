"""Which chunks of the target are compressed or decompressed after the hand-over."""

from __future__ import annotations

from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import Chunk, Hypertable, Layout
from live_migration.coordinator.timescale_handover import _compression, _unlike

METRICS = QualifiedName("public", "metrics")


def layout(first: int, *compressed: bool) -> tuple[Layout, dict[int, str]]:
    """A hypertable with a chunk for each flag, which begin at 0, 1, 2 ... on every server, whatever they are called."""
    chunks = {
        first + n: Chunk(first + n, QualifiedName("inner", f"c{first + n}"), 1, "true", 900 + n if flag else None)
        for n, flag in enumerate(compressed)
    }
    slices = {oid: f'{{"time": [{oid - first}, {oid - first + 1}]}}' for oid in chunks}
    return Layout("2.29.2", {1: Hypertable(1, 1, METRICS, "time")}, chunks), slices


def test_chunks_become_as_their_twins_were() -> None:
    theirs = _compression(*layout(10, True, True, False, False))
    ours, slices = layout(50, True, False, True, False)
    to_compress, to_decompress = _unlike(theirs, ours, slices)
    # one that is compressed here too may have rows beside the compressed ones
    assert to_compress == [QualifiedName("inner", "c50"), QualifiedName("inner", "c51")]
    assert to_decompress == [QualifiedName("inner", "c52")]


def test_a_chunk_without_a_twin_is_left() -> None:
    """It was dropped on the source, merged or split."""
    theirs = _compression(*layout(10, False))
    ours, slices = layout(50, False, True, False)
    assert _unlike(theirs, ours, slices) == ([], [])
