"""`sdar logs` on the files of a run: one order, one form, filters by age and level. Containers:
tests/compose, tests/kube.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sdar.cli.logs import Source, _Followers
from sdar.cli.main import main
from sdar.cli.processes import end_with_parent
from sdar.cli.run_directory import RunDirectory
from sdar.contracts.errors import UnavailableError

Capture = pytest.CaptureFixture[str]


def at(minutes_ago: float) -> str:
    return (datetime.now(UTC) - timedelta(minutes=minutes_ago)).isoformat().replace("+00:00", "Z")


def write(runs: Path, run: str, name: str, *lines: str) -> Path:
    path = runs / run / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    rollout = (
        f"{at(90)} [info     ] group_played                   group_id=group-00000001",
        "INFO 11-23 05:00:00 [core.py:77] of another library",
        f"{at(50)} [error    ] group_broke_worker             group_id=group-00000002",
        "    Traceback (most recent call last):",
        "    ValueError: the fifth step",
    )
    learner = (
        json.dumps(
            {
                "loss": 0.5,
                "event": "batch_trained",
                "level": "info",
                "service": "learner",
                "timestamp": at(70),
            }
        ),
        "Traceback (most recent call last):",
        '  File "x.py", line 1',
        "ValueError: nobody caught it",
        json.dumps(
            {
                "event": "checkpoint_written",
                "level": "debug",
                "service": "learner",
                "timestamp": at(10),
            }
        ),
    )
    write(tmp_path, "house", "rollout-0", *rollout)
    write(tmp_path, "house", "learner", *learner)
    return tmp_path


def run_logs(capfd: Capture, runs: Path, *arguments: str) -> tuple[int, list[str], str]:
    with pytest.raises(SystemExit) as ended:
        main(["logs", *arguments, "--runs-dir", str(runs)])
    out, err = capfd.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.splitlines(), err


def show(capfd: Capture, runs: Path, *arguments: str) -> list[str]:
    code, lines, err = run_logs(capfd, runs, *arguments)
    assert code == 0, err
    return lines


def test_lines_of_all_services_come_in_the_order_of_time_and_say_whose_they_are(
    runs: Path, capfd: Capture
) -> None:
    shown = [line.split(None, 2) for line in show(capfd, runs)]
    assert [words[0] for words in shown] == ["rollout-0"] * 2 + ["learner"] * 4 + [
        "rollout-0"
    ] * 3 + ["learner"]
    assert "group_played" in shown[0][2]
    assert "batch_trained" in shown[2][2]


def test_a_level_keeps_what_is_as_grave_and_the_tracebacks_with_it(
    runs: Path, capfd: Capture
) -> None:
    shown = "\n".join(show(capfd, runs, "--level", "error"))
    assert "nobody caught it" in shown
    assert "the fifth step" in shown
    assert "batch_trained" not in shown
    assert "another library" not in shown
    assert "checkpoint_written" not in "\n".join(show(capfd, runs, "--level", "info"))


def test_an_age_leaves_older_lines_out(runs: Path, capfd: Capture) -> None:
    shown = show(capfd, runs, "--since", "1h")
    assert "group_broke_worker" in shown[0]
    assert len(shown) == 4
    code, _, err = run_logs(capfd, runs, "--since", "yesterday")
    assert (code, "10m" in err) == (2, True)


def test_one_service_is_shown_by_its_role_or_its_instance_and_others_are_named(
    runs: Path, capfd: Capture
) -> None:
    write(
        runs, "house", "rollout-1", f"{at(5)} [info     ] worker_drained                 num_left=0"
    )
    assert len(show(capfd, runs, "rollout")) == 6
    assert len(show(capfd, runs, "rollout-1")) == 1
    code, _, err = run_logs(capfd, runs, "learners")
    assert (code, "learner, rollout, rollout-0, rollout-1" in err) == (2, True)


def test_a_line_of_json_is_shown_as_the_same_line_of_text_would_be(
    tmp_path: Path, capfd: Capture
) -> None:
    code = (
        "import sys, structlog; from sdar.process.telemetry import configure_logging\n"
        "configure_logging('learner', 'learner', 'info', sys.argv[1])\n"
        "log = structlog.get_logger()\n"
        "log.warning('disk_full', path='/data', size=3, text='a\\x1b[2Jb')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: log.exception('broke', group_id='g')\n"
    )
    for form in ("text", "json"):
        done = subprocess.run(
            [sys.executable, "-c", code, form], stderr=subprocess.PIPE, text=True, check=True
        )
        write(tmp_path, form, "learner", *done.stderr.splitlines())

    def shapes(form: str) -> list[str]:
        lines = show(capfd, tmp_path, "--run", form)
        return [
            " ".join(
                word
                for word in line.split()
                if not word.startswith(("20", "service=", "instance="))
            )
            for line in lines
        ]

    text, from_json = shapes("text"), shapes("json")
    assert text == from_json
    assert text[-1].endswith("ZeroDivisionError: division by zero")
    assert "a\\x1b[2Jb" in text[0]


def test_for_programs_every_line_is_an_object(runs: Path, capfd: Capture) -> None:
    objects = [json.loads(line) for line in show(capfd, runs, "--json")]
    assert {one["source"] for one in objects} == {"learner", "rollout-0"}
    assert next(one for one in objects if one.get("event") == "batch_trained")["loss"] == 0.5


def test_no_line_gives_orders_to_the_terminal(tmp_path: Path, capfd: Capture) -> None:
    write(tmp_path, "a", "envs", "\x1b[2J\x9b31m cleared \u202e")
    assert show(capfd, tmp_path) == ["envs | \\x1b[2J\\x9b31m cleared \\u202e"]


def test_the_run_is_the_one_that_runs_else_the_last_one(runs: Path, capfd: Capture) -> None:
    write(runs, "older", "envs", "from the older one")
    assert "from the older one" in show(capfd, runs)[0]
    with RunDirectory(runs / "house") as house:
        house.write_json(house.gateway, {"address": "127.0.0.1:1"})
        assert "group_played" in show(capfd, runs)[0]
        with RunDirectory(runs / "older") as older:
            older.write_json(older.gateway, {"address": "127.0.0.1:2"})
            code, _, err = run_logs(capfd, runs)
            assert (code, "house, older" in err) == (2, True)
            assert len(show(capfd, runs, "--run", "older")) == 1
    code, _, err = run_logs(capfd, runs, "--run", "newest")
    assert (code, "house, older" in err) == (2, True)
    assert run_logs(capfd, runs / "nowhere")[0] == 2


def test_following_shows_what_comes_also_from_a_service_that_is_new(runs: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sdar.cli.main",
        "logs",
        "--follow",
        "--since",
        "30m",
        "--runs-dir",
        str(runs),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent
    )
    try:
        assert process.stdout is not None
        assert "checkpoint_written" in process.stdout.readline()
        with (runs / "house" / "logs" / "rollout-0.log").open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat()} [info     ] half a ")
            log.flush()
            time.sleep(0.5)
            log.write("line\n")
        assert process.stdout.readline().endswith("half a line\n")
        write(runs, "house", "teacher", f"{datetime.now(UTC).isoformat()} [info     ] batch_scored")
        assert process.stdout.readline().startswith("teacher")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_following_outlives_an_api_server_that_is_away_for_a_moment() -> None:
    source = Source(
        "gateway-1", "gateway", lambda since_s, is_following: iter([]), is_stamped=False
    )
    found: list[list[Source] | Exception] = [
        [source],
        UnavailableError("The API server is away."),
        [source],
    ]

    def look() -> list[Source]:
        if isinstance(answer := found.pop(0), Exception):
            raise answer
        return answer

    followers = _Followers(look, queue.Queue(), 0.0)
    for _ in range(3):
        followers.look()
    assert found == []
    with pytest.raises(UnavailableError):  # at first it is an answer
        _Followers(lambda: _raise(UnavailableError("It is away.")), queue.Queue(), 0.0).look()


def _raise(error: Exception) -> list[Source]:
    raise error


def test_two_places_contradict_each_other(tmp_path: Path, capfd: Capture) -> None:
    for verb in ("status", "logs", "pause"):
        with pytest.raises(SystemExit) as ended:
            main([verb, "--release", "a", "--compose"])
        assert (ended.value.code, "two places" in capfd.readouterr().err) == (2, True)
    code, _, err = run_logs(capfd, tmp_path, "--namespace", "a")
    assert (code, "--release NAME" in err) == (2, True)


def test_a_tool_that_is_missing_is_named(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for place, tool in (
        ("--release=a", "kubectl is not installed"),
        ("--compose", "docker-compose"),
    ):
        for verb in ("status", "logs"):
            with pytest.raises(SystemExit) as ended:
                main([verb, place])
            assert (ended.value.code, tool in capfd.readouterr().err) == (2, True)
