"""`sdar status` and `sdar dead-letter` against a real gateway application, served over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from sdar.cli.gateway import ContainerGateway
from sdar.cli.main import main
from sdar.cli.run_directory import RunDirectory
from sdar.config import load_config
from sdar.contracts import codec
from sdar.contracts.errors import UnavailableError, UnknownResourceError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome
from sdar.wire.http_server import bind_http, build_http_server
from services.gateway.app import build_app
from services.gateway.watch import Watch
from tests.support import until
from tests.unit.gateway.fakes import build_config, play
from tests.unit.gateway.test_scheduler import Run, begin

HOSTILE = "[red]lost[/red] <b>\x1b[2J"

Command = Callable[..., str]


class ServedRun:
    """A gateway with one failed group and two dead letters, on an event loop of its own thread."""

    def __init__(self) -> None:
        self.letters: list[str] = []
        self.address = ""
        self._ready: Future[None] = Future()
        self._stop: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> ServedRun:
        self._thread.start()
        self._ready.result(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._thread.join(30)

    async def _serve(self) -> None:
        try:
            run = Run(build_config())
            await self._prepare(run)
            watch = Watch(run.scheduler, run.bus, answer_s=30.0)  # however busy the machine is
            await watch.refresh()
            app = build_app(run.scheduler, watch, run.bus, registry=CollectorRegistry())
            server = build_http_server(app, "127.0.0.1")
            listener = bind_http("127.0.0.1", 0)
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
            loop = asyncio.get_running_loop()
            self._stop = lambda: loop.call_soon_threadsafe(setattr, server, "should_exit", True)
        except BaseException as error:
            self._ready.set_exception(error)
            raise
        self._ready.set_result(None)
        await server.serve(sockets=[listener])
        await run.stop()

    async def _prepare(self, run: Run) -> None:
        _, training = await begin(run)
        await run.report(GroupOutcome.FAILED, training[3], reason=HOSTILE)
        await run.take(1)
        await run.settle()
        await until(
            lambda: run.scheduler.ledger.num_issued == 5
        )  # it reads the account once a turn
        readable = codec.encode_trajectory(play(training[0], 0))
        for payload, reason in ((readable, HOSTILE), (b"\xff nonsense", "cannot be decoded")):
            self.letters.append(
                await run.set_aside(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, payload, reason)
            )


@pytest.fixture(scope="module")
def served() -> Iterator[ServedRun]:
    with ServedRun() as served:
        yield served


@pytest.fixture
def run_sdar(
    served: ServedRun, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--gateway", f"http://{served.address}"])
        out, err = capfd.readouterr()
        assert ended.value.code == 0, err
        return out

    return run


def refuse(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code, capfd.readouterr().err


def test_status_shows_both_equations_and_the_alarms(run_sdar: Command) -> None:
    out = run_sdar("status")
    assert "test: grpo, running" in out
    assert "update 0 of 2, policy version 0" in out
    assert re.search(r"tasks +0 +0 +0\.0 s", out)
    assert "issued 5 = running 4 + generated 1" in out
    assert (
        "generated 1 = trained 0 + skipped 0 + stale 0 + failed 1 + cancelled 0 + buffered 0"
        in " ".join(out.split())
    )
    assert "dead_letters: 2 entries were set aside." in out


def test_text_of_a_run_is_neither_markup_nor_an_order_to_the_terminal(run_sdar: Command) -> None:
    for out in (run_sdar("status"), run_sdar("dead-letter", "list")):
        assert r"[red]lost[/red] <b>\x1b[2J" in out
        assert "\x1b" not in out


def test_status_as_json_is_what_the_gateway_says(run_sdar: Command) -> None:
    status: dict[str, Any] = json.loads(run_sdar("status", "--json"))
    assert (status["ledger"]["issued"], status["bus"]["state"]) == (5, "ok")


def test_a_letter_is_listed_shown_and_retried_once(
    run_sdar: Command, served: ServedRun, capfd: pytest.CaptureFixture[str]
) -> None:
    readable, nonsense = served.letters
    listed = json.loads(run_sdar("dead-letter", "list", "--json"))
    assert [letter["letter_id"] for letter in listed] == [nonsense, readable]
    assert (
        json.loads(run_sdar("dead-letter", "list", "--json", "--before", nonsense))[0]["letter_id"]
        == readable
    )
    shown = run_sdar("dead-letter", "show", readable)
    assert '"description": "do ' in shown
    assert "\x1b" not in shown
    assert "/yBub25zZW5zZQ==" in run_sdar("dead-letter", "show", nonsense)
    assert "Issued group-00000005" in run_sdar("dead-letter", "retry", readable)
    url = f"http://{served.address}"
    code, error = refuse(capfd, "dead-letter", "retry", readable, "--gateway", url)
    assert (code, "no dead letter" in error) == (2, True)
    code, error = refuse(capfd, "dead-letter", "retry", nonsense, "--gateway", url)
    assert (code, "cannot be read" in error) == (2, True)


def test_the_one_running_run_is_asked_and_none_or_several_are_told(
    served: ServedRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = ("status", "--runs-dir", str(tmp_path))
    assert "No run is running" in refuse(capfd, *runs)[1]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(RunDirectory(tmp_path / "a"))
        first.write_json(first.gateway, {"address": served.address})
        assert refuse(capfd, *runs)[0] == 0
        second = stack.enter_context(RunDirectory(tmp_path / "b"))
        second.write_json(second.gateway, {"address": "127.0.0.1:1"})
        code, error = refuse(capfd, *runs)
        assert (code, f"a (--gateway {served.address})" in error) == (2, True)


def test_a_run_is_paused_resumed_and_stopped(
    run_sdar: Command, served: ServedRun, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_sdar("pause").splitlines()[-1] == "test is paused, update 0 of 2."
    assert json.loads(run_sdar("status", "--json"))["phase"] == "paused"
    assert json.loads(run_sdar("resume", "--json").splitlines()[-1])["phase"] == "running"
    assert "test is stopping" in run_sdar("stop")
    code, error = refuse(capfd, "pause", "--gateway", f"http://{served.address}")
    assert (code, "stopping" in error) == (2, True)


def test_the_report_of_a_run_elsewhere_is_made_here(
    served: ServedRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = ("--gateway", f"http://{served.address}")
    for _ in range(2):  # again, to have what is new
        assert refuse(capfd, "report", str(tmp_path / "test"), *place)[0] == 0
    assert load_config(tmp_path / "test" / "config.yaml").name == "test"
    assert "grpo" in (tmp_path / "test" / "report.html").read_text()
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    code, error = refuse(capfd, "report", str(tmp_path / "mine"), *place)
    assert (code, "holds another run" in error) == (2, True)


def test_a_gateway_in_a_container_is_asked_by_the_container(served: ServedRun) -> None:
    """The container is played by `env`: it has the address, and runs what it is given."""
    python = str(Path(sys.executable).parent)
    command = (
        "env",
        f"SDAR_GATEWAY_URL=http://{served.address}",
        f"PATH={python}:{os.environ['PATH']}",
    )
    with ContainerGateway("pod gateway-0", command) as gateway:
        assert [
            letter["letter_id"] for letter in gateway.get("/v1/dead-letters", limit=1)
        ] == served.letters[1:]
        with pytest.raises(UnknownResourceError, match="no dead letter 1-1"):
            gateway.get("/v1/dead-letters/1-1")
    away = ContainerGateway("pod gateway-0", (*command, "SDAR_GATEWAY_URL=http://127.0.0.1:1"))
    with pytest.raises(
        UnavailableError, match=r"Asked in pod gateway-0: No gateway answers at 127\.0\.0\.1:1"
    ):
        away.get("/v1/run")
    gone = ContainerGateway("pod gateway-0", ("sh", "-c", "echo no such container >&2; exit 1"))
    with pytest.raises(UnavailableError, match="no such container"):
        gone.get("/v1/run")


@pytest.mark.parametrize(
    "url", ["ftp://a:1", "nowhere", "http://a", "http://a:99999", "http://a:1/path", "http://"]
)
def test_what_is_no_address_is_refused(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, error = refuse(capfd, "status", "--gateway", url)
    assert (code, "http://HOST:PORT" in error) == (2, True)


def test_a_gateway_that_is_not_there_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    code, error = refuse(capfd, "status", "--gateway", "127.0.0.1:1")
    assert (code, "No gateway answers at 127.0.0.1:1" in error) == (1, True)
