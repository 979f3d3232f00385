"""How much of a walsender's stream may be under way to us.

A walsender sends each row's message by itself. Where the receiver has room, each is a packet of its own, through the whole stack: on one
machine that is twice what decoding costs. With a small receive buffer the window is closed while we pause, and what the walsender sends
lies together in its own buffer, from where it comes in large packets when we read.
Measured: docs/performance.md, "Where the time goes".
"""

from __future__ import annotations

import asyncio
import socket
import struct

from live_migration.common.telemetry import get_logger

log = get_logger(__name__)

RECEIVE_BYTES = 16 * 1024
"""The smallest that took nothing from the speed; the kernel doubles it for its own book-keeping."""
NEAR_MICROSECONDS = 500
"""A round trip up to which so small a window still lets through more than a walsender can decode (16 KiB each 0.5 ms: 32 MB/s)."""

_TCP_INFO_BYTES = 152
_MIN_RTT = struct.Struct("=148xI")
"""`tcpi_min_rtt` in Linux's struct tcp_info, in µs. Source: include/uapi/linux/tcp.h."""


def narrow_window(transport: asyncio.BaseTransport) -> None:
    """Give the connection a small receive buffer if the server is near enough for it."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    round_trip = min_round_trip(connection) if connection is not None else None
    if connection is not None and round_trip is not None and round_trip <= NEAR_MICROSECONDS:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        log.debug("the source is near: small receive buffer", round_trip_us=round_trip, bytes=RECEIVE_BYTES)


def min_round_trip(connection: socket.socket) -> int | None:
    """Give the shortest round trip seen on a TCP connection in µs; None where the system does not tell."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, option, _TCP_INFO_BYTES)
    except OSError:
        return None
    return int(_MIN_RTT.unpack(info)[0]) if len(info) == _TCP_INFO_BYTES else None
