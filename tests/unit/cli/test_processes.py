from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sdar.cli.processes import Fleet, ServiceFailedError, ServiceProcess, choose_port
from sdar.contracts.errors import ConflictError


class ScriptProcess(ServiceProcess):
    """A service whose process runs a Python snippet instead of `sdar serve`."""

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.arguments[0]]


def script(tmp_path: Path, code: str, name: str = "teacher") -> ScriptProcess:
    return ScriptProcess(name, (code,), {}, tmp_path / f"{name}.log", "http://127.0.0.1:9")


def wait_for_end(service: ServiceProcess) -> None:
    assert service.process is not None
    service.process.wait(10)


def test_a_service_that_died_is_started_again(tmp_path: Path) -> None:
    fleet = Fleet()
    service = script(tmp_path, "import sys; sys.exit(1)")
    fleet.add(service)
    wait_for_end(service)
    first = service.process
    assert fleet.check() == ["teacher"]
    assert service.process is not first
    fleet.kill()


def test_a_service_that_keeps_dying_ends_the_run_with_its_last_words(tmp_path: Path) -> None:
    fleet = Fleet()
    service = script(
        tmp_path, "import sys; print('error: the moon is missing', file=sys.stderr); sys.exit(1)"
    )
    fleet.add(service)
    for _ in range(5):
        wait_for_end(service)
        assert fleet.check() == ["teacher"]
    wait_for_end(service)
    with pytest.raises(ServiceFailedError, match="the moon is missing"):
        fleet.check()


def test_a_service_that_refuses_is_not_started_again(tmp_path: Path) -> None:
    fleet = Fleet()
    service = script(
        tmp_path, "import sys; print('error: no such model', file=sys.stderr); sys.exit(2)"
    )
    fleet.add(service)
    wait_for_end(service)
    with pytest.raises(ServiceFailedError, match="no such model"):
        fleet.check()
    assert service.restarts == []


def test_stopping_kills_what_ignores_the_request_and_says_so(tmp_path: Path) -> None:
    fleet = Fleet()
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf', flush=True); signal.pause()"
    )
    service = script(tmp_path, code)
    fleet.add(service)
    while b"deaf" not in service.log_path.read_bytes():
        assert service.is_running
    assert fleet.stop(("teacher",), timeout_s=0.2) == ["teacher"]
    assert not service.is_running


def test_what_a_service_started_ends_with_it(tmp_path: Path) -> None:
    fleet = Fleet()
    code = (
        "import subprocess, sys, signal; p = subprocess.Popen(['sleep', '600']); "
        "print(p.pid, flush=True); signal.pause()"
    )
    service = script(tmp_path, code)
    fleet.add(service)
    while not service.log_path.read_text().endswith("\n"):
        assert service.is_running
    grandchild = int(service.log_path.read_text())
    fleet.stop(("teacher",), timeout_s=5)
    assert _ends(grandchild)


def test_services_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    code = f"""
import signal, sys
from pathlib import Path
from tests.unit.cli.test_processes import script
service = script(Path({str(tmp_path)!r}), "import signal; print('up', flush=True); signal.pause()")
service.start()
print(service.process.pid, flush=True)
signal.pause()
"""
    root = Path(__file__).parents[3]
    supervisor = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert supervisor.stdout is not None
    pid = int(supervisor.stdout.readline())
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    supervisor.stdout.close()
    assert _ends(pid)


def test_a_taken_port_is_refused_and_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConflictError, match=f"Port {port}"):
            choose_port("127.0.0.1", port)
    assert choose_port("127.0.0.1", 0) > 0


def _ends(pid: int, timeout_s: float = 10.0) -> bool:
    """Whether a process of somebody else's ends in time: its pidfd becomes readable then."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([descriptor], [], [], timeout_s)
    os.close(descriptor)
    return bool(ended)
