"""A container asks its probe port, or as gateway its HTTP port, even with certificates."""

import asyncio

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from sdar.process import probe
from sdar.process.ports import find_free_port
from sdar.process.settings import Settings
from sdar.process.telemetry import Health, ProbeServer
from sdar.wire.http_server import bind_http, build_http_server
from sdar.wire.security import Security
from tests.certificates import Authority


@pytest.fixture
def port(monkeypatch):
    port = find_free_port("127.0.0.1")
    monkeypatch.setenv("SDAR_PROBE_PORT", str(port))
    monkeypatch.setenv("SDAR_HTTP_PORT", str(find_free_port("127.0.0.1")))
    return port


@pytest.fixture
def health(port):
    health = Health()
    server = ProbeServer("127.0.0.1", port, health, CollectorRegistry())
    server.start()
    yield health
    server.stop()


def test_a_service_that_starts_lives_and_is_not_ready(health, capsys):
    assert probe.main([]) == 0
    assert probe.main(["--ready"]) == 1
    assert capsys.readouterr().out == "200 starting\n503 starting\n"


def test_a_ready_service_is_ready_until_it_waits_for_another(health, capsys):
    health.mark_ready()
    assert probe.main(["--ready"]) == 0
    health.report_blocked("Redis does not answer")
    assert probe.main(["--ready"]) == 1
    assert "Redis does not answer" in capsys.readouterr().out


def test_a_silent_main_loop_is_dead(health):
    health.max_silence_s = 0.0
    assert probe.main([]) == 1


def test_where_nothing_listens_the_answer_is_no(port, capsys):
    assert probe.main([]) == 1
    assert "no answer" in capsys.readouterr().out


def test_a_bad_setting_is_told_and_the_answer_is_no(monkeypatch, capsys):
    monkeypatch.setenv("SDAR_PROBE_PORT", "none")
    assert probe.main([]) == 1
    assert "SDAR_PROBE_PORT" in capsys.readouterr().out


def test_an_unknown_argument_is_refused(capsys):
    assert probe.main(["--live"]) == 2
    assert "--live" in capsys.readouterr().err


@pytest.mark.parametrize("client_auth", ["none", "all"])
async def test_the_gateway_is_asked_over_tls_and_shown_its_own_certificate(tmp_path, client_auth):
    authority = Authority(tmp_path)
    files = authority.issue("gateway")
    settings = Settings(
        http_port=find_free_port("127.0.0.1"),
        probe_port=find_free_port("127.0.0.1"),
        tls_cert=files.certificate,
        tls_key=files.key,
        tls_ca=authority.certificate,
        tls_client_auth=client_auth,
    )
    app = FastAPI()
    app.get("/healthz")(lambda: "alive")
    server = build_http_server(app, "127.0.0.1", Security.from_settings(settings))
    serving = asyncio.create_task(
        server.serve(sockets=[bind_http("127.0.0.1", settings.http_port)])
    )
    try:
        assert await asyncio.to_thread(probe.ask, "/healthz", settings) == (200, '"alive"')
        assert (await asyncio.to_thread(probe.ask, "/readyz", settings))[0] == 404
    finally:
        server.should_exit = True
        await serving
