from __future__ import annotations

import socket

from sdar.process import ports
from sdar.process.ports import find_free_port


def test_a_port_is_free_and_none_that_an_outgoing_connection_could_take() -> None:
    port = find_free_port("127.0.0.1")
    assert port < int(ports._EPHEMERAL_RANGE.read_text().split()[0])
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_ports_are_not_chosen_in_an_order_that_two_runs_would_share() -> None:
    assert len({find_free_port("127.0.0.1") for _ in range(20)}) > 10
