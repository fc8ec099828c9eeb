from __future__ import annotations

import contextlib
import subprocess
import sys

import psutil


def test_an_engine_does_not_outlive_a_service_that_was_killed() -> None:
    service = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.engine_child"], stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    with service.stdout:
        core = psutil.Process(int(service.stdout.readline()))
    service.kill()
    service.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        core.wait(10)
    assert not core.is_running()
