"""The embedded Redis starts, answers, keeps data, dies with its parent, explains failures."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import redis

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.contracts.errors import BusUnavailableError, ConfigurationError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "data", max_memory_bytes=50_000_000) as server:
        yield server


def test_it_answers_with_the_settings_that_keep_data(server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        settings = client.config_get()
    wanted = {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory": "50000000",
        "maxmemory-policy": "noeviction",
        "save": "",
        "bind": "127.0.0.1",
    }
    assert {name: settings[name] for name in wanted} == wanted
    assert server.log_path.exists()


@pytest.mark.parametrize(
    ("fsync", "end"), [("everysec", EmbeddedRedis.stop), ("always", EmbeddedRedis.kill)]
)
def test_it_keeps_its_data_and_its_address_across_a_restart(
    tmp_path: Path, fsync: Literal["everysec", "always"], end: Callable[[EmbeddedRedis], None]
) -> None:
    with EmbeddedRedis(tmp_path, fsync=fsync) as server:
        address = server.url
        with redis.Redis.from_url(address) as client:
            client.set("key", "value")
        end(server)
        assert not server.is_running()
        assert server.start() == address
        with redis.Redis.from_url(address) as client:
            assert client.get("key") == b"value"


def test_starting_and_stopping_twice_is_harmless(server: EmbeddedRedis) -> None:
    pid = server.pid
    server.start()
    assert server.pid == pid
    server.stop()
    server.stop()
    assert server.pid is None


def test_it_listens_on_a_unix_socket_alone(tmp_path: Path) -> None:
    with (
        EmbeddedRedis(tmp_path, unix_socket=tmp_path / "s") as server,
        redis.Redis.from_url(server.url, decode_responses=True) as client,
    ):
        assert client.config_get("port") == {"port": "0"}


def test_a_taken_port_is_reported_with_the_servers_own_words(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BusUnavailableError, match=r"ended while starting.*redis\.log"):
            EmbeddedRedis(tmp_path, port=taken.getsockname()[1]).start()


def test_another_redis_on_the_port_is_not_mistaken_for_it(
    server: EmbeddedRedis, tmp_path: Path
) -> None:
    port = int(server.url.rpartition(":")[2].removesuffix("/0"))
    with pytest.raises(BusUnavailableError, match="ended while starting"):
        EmbeddedRedis(tmp_path / "second", port=port).start()


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    server = EmbeddedRedis(tmp_path, executable=silent, start_timeout_s=0.2)
    with pytest.raises(BusUnavailableError, match=r"did not answer in 0\.2 s"):
        server.start()
    assert not server.is_running()


def test_it_has_no_address_before_it_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Start it first"):
        _ = EmbeddedRedis(tmp_path).url


def test_a_socket_path_too_long_for_the_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="shorter"):
        EmbeddedRedis(tmp_path, unix_socket=tmp_path / ("x" * 120))


def test_it_dies_with_its_parent_even_when_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys\n"
        "from sdar.bus.embedded_redis import EmbeddedRedis\n"
        "server = EmbeddedRedis(pathlib.Path(sys.argv[1]))\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        # A pidfd becomes readable when its process ends.
        handle = os.pidfd_open(pid)
        parent.send_signal(signal.SIGKILL)
    ended, _, _ = select.select([handle], [], [], 10.0)
    os.close(handle)
    assert ended
