"""The receive buffer of a replication connection: small within a machine, left alone over a network."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from live_migration.producer import window


class Transport:
    """Gives a socket; `peer`: what it takes for its peer's address."""

    def __init__(self, connection: socket.socket | None, peer: str | None = None) -> None:
        self._connection = connection
        self._peer = peer

    def get_extra_info(self, name: str) -> object:
        assert name == "socket"
        return Elsewhere(self._connection, self._peer) if self._connection and self._peer else self._connection


class Elsewhere:
    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._connection = connection
        self._peer = peer
        self.family = connection.family

    def getpeername(self) -> tuple[str, int]:
        return self._peer, 5432

    def getsockname(self) -> tuple[str, int]:
        return self._connection.getsockname()  # type: ignore[no-any-return]

    def setsockopt(self, *arguments: int) -> None:
        self._connection.setsockopt(*arguments)


@pytest.fixture
def near() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        peer, _ = server.accept()
        with peer:
            yield connection


def receive_bytes(connection: socket.socket) -> int:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def test_a_server_on_this_machine_gets_a_small_window(near: socket.socket) -> None:
    before = receive_bytes(near)
    assert window.narrow_window(Transport(near))  # type: ignore[arg-type]
    assert receive_bytes(near) == 2 * window.RECEIVE_BYTES < before


def test_a_server_elsewhere_keeps_its_window(near: socket.socket) -> None:
    before = receive_bytes(near)
    assert not window.narrow_window(Transport(near, peer="192.0.2.1"))  # type: ignore[arg-type]
    assert receive_bytes(near) == before


def test_what_is_no_tcp_connection_is_left_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not window.narrow_window(Transport(ours))  # type: ignore[arg-type]
    assert not window.narrow_window(Transport(None))  # type: ignore[arg-type]
    assert not window.narrow_window(Transport(socket.socket()))  # type: ignore[arg-type]
