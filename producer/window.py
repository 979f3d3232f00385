"""How much of a walsender's stream may be under way to us.

A walsender sends each row's message by itself. Where the receiver has room, each is a packet of its own, through the whole stack: on one
machine that is twice what decoding costs. With a small receive buffer the window is closed while we pause, and what the walsender sends
lies together in its own buffer, from where it comes in large packets when we read.
Measured: docs/performance.md, "Where the time goes".
"""

from __future__ import annotations

import asyncio
import socket

from live_migration.common.telemetry import get_logger

log = get_logger(__name__)

RECEIVE_BYTES = 16 * 1024
"""The smallest that took nothing from the speed; the kernel doubles it for its own book-keeping."""


def narrow_window(transport: asyncio.BaseTransport) -> bool:
    """Give a connection within this machine a small receive buffer; tell whether it is one.

    There the next packets are here as soon as the last ones are read. Over a network so small a window would cost a round trip for every
    16 KiB.
    """
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        is_here = bool(connection.getpeername()[0] == connection.getsockname()[0])
    except OSError:  # gone already, which whoever uses it finds out
        return False
    if is_here:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        log.debug("the source is on this machine: small receive buffer", bytes=RECEIVE_BYTES)
    return is_here
