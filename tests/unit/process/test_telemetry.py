"""Logs that nobody's words can break, and probes that a silent client does not block."""

import json
import socket
import subprocess
import sys

import httpx
import pytest
from prometheus_client import CollectorRegistry

from sdar.contracts.errors import CapacityError
from sdar.process.telemetry import Health, ProbeServer, build_registry
from sdar.wire.http_server import build_error_response

HOSTILE = "ok\n2026-01-01 [info] forged \x1b[2J\x1b]0;owned\x07 \r\u2028\u202eevil\x85\x00"


def log_in_a_process(format: str) -> list[str]:
    """Log lines of an event with odd values and a traceback, from a process of its own."""
    program = f"""
import structlog
from sdar.process.telemetry import configure_logging
configure_logging("envs", {HOSTILE!r}, "info", {format!r})
log = structlog.get_logger()
hostile = {HOSTILE!r}
log.info(hostile, text=hostile, inside=[hostile], number=1)
try:
    raise ValueError(hostile)
except ValueError:
    log.exception("failed", why=hostile)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, timeout=60
    )
    return done.stderr.decode().removesuffix("\n").split("\n")


@pytest.fixture(scope="module")
def lines():
    return log_in_a_process("text")


def test_nobodys_words_begin_a_line_of_the_log(lines):
    events = [line for line in lines if not line.startswith("    ")]
    assert len(events) == 2
    assert "forged" in events[0]
    assert all(line[:4].isdigit() for line in events)


def test_no_control_character_reaches_the_terminal(lines):
    assert not set("".join(lines)) & set("\x1b\x07\r\x00\x85\u2028\u202e")
    assert "\\x1b" in lines[0]


def test_a_traceback_is_there_and_shows_no_local_variables(lines):
    assert any(line.strip().startswith("Traceback") for line in lines)
    assert not any("hostile =" in line for line in lines)


def test_json_lines_are_one_object_each():
    events = [json.loads(line) for line in log_in_a_process("json")]
    assert [event["level"] for event in events] == ["info", "error"]
    assert events[0]["text"] == HOSTILE


def test_a_client_that_says_nothing_does_not_keep_the_next_probe_waiting():
    health = Health()
    health.mark_ready()
    server = ProbeServer("127.0.0.1", 0, health, CollectorRegistry())
    server.start()
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as silent:
            silent.sendall(b"GET /healthz HT")
            assert (
                httpx.get(
                    f"http://127.0.0.1:{server.port}/readyz", timeout=5, trust_env=False
                ).status_code
                == 200
            )
    finally:
        server.stop()


def test_every_service_counts_its_answers_with_an_error_by_kind():
    registry, labels = build_registry(), {"protocol": "http", "reason": "CAPACITY"}
    before = registry.get_sample_value("sdar_error_answers_total", labels) or 0.0
    build_error_response(CapacityError("full"))
    assert registry.get_sample_value("sdar_error_answers_total", labels) == before + 1
    assert (
        registry.get_sample_value(
            "sdar_error_answers_total", {"protocol": "grpc", "reason": "INTERNAL"}
        )
        is not None
    )
