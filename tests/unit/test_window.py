"""The receive buffer of a replication connection: small where the server is near, left alone where it is not."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from live_migration.producer import window


class Transport:
    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection

    def get_extra_info(self, name: str) -> socket.socket | None:
        assert name == "socket"
        return self._connection


@pytest.fixture
def near() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        peer, _ = server.accept()
        with peer:
            connection.sendall(b"x")
            assert peer.recv(1) == b"x"
            yield connection


def receive_bytes(connection: socket.socket) -> int:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def test_a_near_server_gets_a_small_window(near: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "NEAR_MICROSECONDS", 10_000_000)  # however busy the machine is
    round_trip = window.min_round_trip(near)
    assert round_trip is not None
    assert 0 < round_trip < 10_000_000
    before = receive_bytes(near)
    window.narrow_window(Transport(near))  # type: ignore[arg-type]
    assert receive_bytes(near) == 2 * window.RECEIVE_BYTES < before


def test_a_far_server_keeps_its_window(near: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "min_round_trip", lambda _: window.NEAR_MICROSECONDS + 1)
    before = receive_bytes(near)
    window.narrow_window(Transport(near))  # type: ignore[arg-type]
    assert receive_bytes(near) == before


def test_sockets_that_tell_nothing_are_left_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert window.min_round_trip(ours) is None
        window.narrow_window(Transport(ours))  # type: ignore[arg-type]
    window.narrow_window(Transport(None))  # type: ignore[arg-type]
