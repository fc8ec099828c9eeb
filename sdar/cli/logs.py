"""`sdar logs`: what a run's services log, wherever they run, in the order of time.

A source is one log: a file of `runs/<name>/logs`, a container of Compose, a pod. Services log JSON
in containers and text on one machine; both are shown as text. A line that is not of ours (Redis,
vLLM, a traceback) has the time, and where it tells none the level, of the line before it.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdar.cli.places import ROLE, Place, list_pods
from sdar.cli.run_directory import RunDirectory, list_running
from sdar.cli.tools import find_compose, missing_tool, run_tool
from sdar.contracts.errors import ConfigurationError, UnavailableError, UnknownResourceError
from sdar.contracts.roles import find_role_name
from sdar.process.telemetry import render_event
from sdar.process.text import escape_controls

_LEVELS = ("debug", "info", "warning", "error")
_ALIASES = {"warn": "warning", "critical": "error", "fatal": "error", "exception": "error"}
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGE = re.compile(r"(\d+)([smhd])")
_OURS = re.compile(r"(\d{4}-\d\d-\d\dT\S+) +\[(\w+) *\]")
_OTHERS = re.compile(r"(?:\(.*?\) *)?(DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL)\b")
_LOOK_EVERY_S = 2.0
"""How often pods and files that are new are looked for."""
_READ_EVERY_S = 0.2
_COLOURS = (36, 33, 35, 32, 34, 96, 95, 92)
_LEVEL_COLOURS = {"warning": 33, "error": 31}


@dataclass(frozen=True, slots=True)
class Line:
    """Args: at_s: Unix time. event: a line of JSON as it was logged."""

    at_s: float
    level: str
    text: str
    event: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """One log.

    Args:
        role: the service; several sources may be of one.
        read: its lines; told the Unix time of the first that is wanted, and whether to wait for
            more.
        is_stamped: each line begins with the time at which the container wrote it.
        is_running: more may come.
    """

    name: str
    role: str
    read: Callable[[float, bool], Iterator[str]]
    is_stamped: bool
    is_running: bool = True


def show_logs(
    place: Place,
    run: str | None,
    service: str | None,
    *,
    since: str | None,
    level: str,
    is_following: bool,
    is_json: bool,
) -> None:
    """Print the lines, until the end of the logs or, following, until Ctrl-C.

    Raises:
        UnknownResourceError: there is no such run, release or service. ConfigurationError: the age
            is none.
    """
    since_s = 0.0 if since is None else time.time() - _parse_age(since)

    def look() -> list[Source]:
        return _list_sources(place, run)

    chosen = _choose(look(), service)
    printer = _Printer(level, since_s, is_json, max(len(source.name) for source in chosen))
    if not is_following:
        for name, line in heapq.merge(
            *(_read_once(source, since_s) for source in chosen), key=lambda pair: pair[1].at_s
        ):
            printer.show(name, line)
        return
    lines: queue.Queue[tuple[str, Line]] = queue.Queue(10_000)
    followers = _Followers(lambda: _choose(look(), service), lines, since_s)
    next_look_s = 0.0
    while True:
        if time.monotonic() >= next_look_s:
            followers.look()
            next_look_s = time.monotonic() + _LOOK_EVERY_S
        with contextlib.suppress(queue.Empty):
            printer.show(*lines.get(timeout=_READ_EVERY_S))


def _read_once(source: Source, since_s: float) -> Iterator[tuple[str, Line]]:
    for line in _parse(source, since_s, False):
        yield source.name, line


class _Followers:
    """A thread for each source. One that ends is begun again where it was, while its source is
    there; new ones are joined.
    """

    def __init__(
        self, look: Callable[[], list[Source]], lines: queue.Queue[tuple[str, Line]], since_s: float
    ) -> None:
        self._look = look
        self._lines = lines
        self._since_s = since_s
        self._threads: dict[str, threading.Thread] = {}
        self._seen_s: dict[str, float] = {}

    def look(self) -> None:
        """Follow what is there and not followed."""
        for source in self._look_patiently():
            thread = self._threads.get(source.name)
            if thread is None or (source.is_running and not thread.is_alive()):
                thread = threading.Thread(target=self._follow, args=(source,), daemon=True)
                self._threads[source.name] = thread
                thread.start()

    def _look_patiently(self) -> list[Source]:
        try:
            return self._look()
        except (UnknownResourceError, UnavailableError):
            if not self._threads:
                raise
            return []  # between two pods, or the API server is away for a moment

    def _follow(self, source: Source) -> None:
        shown_s = newest_s = self._seen_s.get(source.name, -1.0)
        for line in _parse(source, max(shown_s, self._since_s), True):
            if line.at_s > shown_s:
                self._seen_s[source.name] = newest_s = max(newest_s, line.at_s)
                self._lines.put((source.name, line))


class _Printer:
    def __init__(self, level: str, since_s: float, is_json: bool, width: int) -> None:
        self._least = _LEVELS.index(level)
        self._since_s = since_s
        self._is_json = is_json
        self._width = width
        self._is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._colours: dict[str, int] = {}

    def show(self, name: str, line: Line) -> None:
        if _LEVELS.index(line.level) < self._least or line.at_s < self._since_s:
            return
        if self._is_json:
            told = {"message": line.text} if line.event is None else line.event
            print(json.dumps({"source": name, **told}), flush=True)
            return
        text = line.text if line.event is None else render_event(line.event)
        prefix = f"{name:{self._width}} | "
        for part in text.splitlines() or [""]:
            part = escape_controls(part, keep="\t")
            if self._is_coloured:
                colour = self._colours.setdefault(
                    name, _COLOURS[len(self._colours) % len(_COLOURS)]
                )
                strong = _LEVEL_COLOURS.get(line.level)
                print(
                    f"\x1b[{colour}m{prefix}\x1b[0m"
                    + (f"\x1b[{strong}m{part}\x1b[0m" if strong else part),
                    flush=True,
                )
            else:
                print(prefix + part, flush=True)


def _parse_age(text: str) -> float:
    if (found := _AGE.fullmatch(text)) is None:
        raise ConfigurationError(f"--since takes an age such as 30s, 10m, 2h or 1d, got {text!r}.")
    return float(found[1]) * _UNITS_S[found[2]]


def _parse(source: Source, since_s: float, is_following: bool) -> Iterator[Line]:
    """The lines of a source, from about `since_s` on: none is left out, some may be older."""
    at_s = 0.0
    level = "info"
    for raw in source.read(since_s, is_following):
        text = raw.rstrip("\r\n")
        if source.is_stamped:
            stamp, _, rest = text.partition(" ")
            if (stamped_s := _read_time(stamp, -1.0)) >= 0:
                at_s = stamped_s
                text = rest
        event = _read_event(text)
        if event is not None:
            at_s = _read_time(str(event.get("timestamp", "")), at_s)
            level = _read_level(str(event.get("level", level)))
        elif (found := _OURS.match(text)) is not None:
            at_s = _read_time(found[1], at_s)
            level = _read_level(found[2])
        elif (found := _OTHERS.match(text)) is not None:
            level = _read_level(found[1])
        elif text.startswith("Traceback"):
            level = "error"
        yield Line(at_s, level, text, event)


def _read_event(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        event = json.loads(text)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _read_level(text: str) -> str:
    name = text.lower()
    name = _ALIASES.get(name, name)
    return name if name in _LEVELS else "info"


def _read_time(text: str, otherwise_s: float) -> float:
    # Of nanoseconds, which containers tell, Python reads six digits.
    text = re.sub(r"(\.\d{6})\d+", r"\1", text)
    try:
        told = datetime.fromisoformat(text)
    except ValueError:
        return otherwise_s
    return (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()


def _choose(sources: Sequence[Source], service: str | None) -> list[Source]:
    chosen = [source for source in sources if service in (None, source.role, source.name)]
    if not chosen:
        known = sorted({name for source in sources for name in (source.role, source.name)})
        raise UnknownResourceError(
            f"Nothing logs as {service!r}. There {'are' if known else 'is nothing here yet'} "
            f"{', '.join(known)}."
            if service
            else "Nothing has logged there yet."
        )
    return chosen


# ---- where logs are


def _list_sources(place: Place, run: str | None) -> list[Source]:
    if place.release:
        return _list_pod_logs(place)
    return _list_compose_logs() if place.is_compose else _list_files(place.runs_dir, run)


def _list_files(runs_dir: Path, run: str | None) -> list[Source]:
    root = _find_run(runs_dir, run)
    directory = RunDirectory(root)
    found = [
        (path, path.stem, find_role_name(path.stem))
        for path in sorted(directory.logs.glob("*.log"))
    ]
    found += [(path, "redis", "redis") for path in directory.redis.glob("*.log")]
    return [Source(name, role, _reader_of(path), is_stamped=False) for path, name, role in found]


def _find_run(runs_dir: Path, run: str | None) -> Path:
    """The run of that name; without one the one that is running, or else that logged last."""
    known = {path.parent.name: path.stat().st_mtime for path in runs_dir.glob("*/logs")}
    if run is not None:
        if run not in known:
            names = ", ".join(sorted(known)) or "none"
            raise UnknownResourceError(
                f"No run {run!r} has logged under {runs_dir}. There are {names}."
            )
        return runs_dir / run
    if not known:
        raise UnknownResourceError(
            f"No run has logged under {runs_dir}. Give another --runs-dir, --compose, or --release "
            "NAME for one in Kubernetes."
        )
    running = list_running(runs_dir)
    if len(running) > 1:
        raise UnknownResourceError(
            f"Several runs are running under {runs_dir}: {', '.join(running)}. Say which with "
            "--run."
        )
    return runs_dir / (next(iter(running)) if running else max(known, key=lambda name: known[name]))


def _reader_of(path: Path) -> Callable[[float, bool], Iterator[str]]:
    def read(since_s: float, is_following: bool) -> Iterator[str]:
        with path.open(encoding="utf-8", errors="replace") as file:
            kept = ""
            while True:
                for text in file:
                    kept += text
                    if kept.endswith("\n"):
                        yield kept
                        kept = ""
                if not is_following:
                    break
                time.sleep(_READ_EVERY_S)
            if kept:
                yield kept

    return read


def _list_compose_logs() -> list[Source]:
    ids = run_tool([*find_compose(), "ps", "--all", "--quiet"]).split()
    found = json.loads(run_tool(["docker", "inspect", *ids])) if ids else []
    labels = [container["Config"]["Labels"] for container in found]
    roles = [label["com.docker.compose.service"] for label in labels]
    numbers = [label["com.docker.compose.container-number"] for label in labels]
    names = [
        role if roles.count(role) == 1 else f"{role}-{number}"
        for role, number in zip(roles, numbers, strict=True)
    ]
    return [
        Source(
            name,
            role,
            _reader_of_container(one["Id"]),
            is_stamped=True,
            is_running=one["State"]["Running"],
        )
        for name, role, one in zip(names, roles, found, strict=True)
    ]


def _reader_of_container(container: str) -> Callable[[float, bool], Iterator[str]]:
    def read(since_s: float, is_following: bool) -> Iterator[str]:
        command = [
            "docker",
            "logs",
            "--timestamps",
            *_when(since_s, "--since"),
            *(["--follow"] if is_following else []),
        ]
        return _read_from([*command, container])

    return read


def _list_pod_logs(place: Place) -> list[Source]:
    sources = []
    for pod in list_pods(place):
        name, role = pod["metadata"]["name"], pod["metadata"]["labels"].get(ROLE, "")
        containers = pod["status"].get("containerStatuses", [])
        one = next(
            (one for one in containers if one["name"] == role),
            containers[0] if containers else None,
        )
        is_blank = one is None or ("waiting" in one["state"] and not one["restartCount"])
        if is_blank and "deletionTimestamp" in pod["metadata"]:
            continue
        if one is None or is_blank:
            reason = (
                "not scheduled" if one is None else one["state"]["waiting"].get("reason", "waiting")
            )
            sources.append(
                Source(
                    name,
                    role,
                    _tell(f"WARNING the pod has not started: {reason}"),
                    True,
                    is_running=False,
                )
            )
        else:
            read = _reader_of_pod(place, name, one["name"])
            sources.append(
                Source(name, role, read, is_stamped=True, is_running="running" in one["state"])
            )
    return sources


def _tell(text: str) -> Callable[[float, bool], Iterator[str]]:
    return lambda since_s, is_following: iter([f"{datetime.now(UTC).isoformat()} {text}"])


def _reader_of_pod(
    place: Place, pod: str, container: str
) -> Callable[[float, bool], Iterator[str]]:
    def read(since_s: float, is_following: bool) -> Iterator[str]:
        options = [
            "--timestamps",
            *_when(since_s, "--since-time"),
            *(["--follow"] if is_following else []),
        ]
        return _read_from([*place.kubectl, "logs", pod, f"--container={container}", *options])

    return read


def _when(since_s: float, option: str) -> list[str]:
    # Whole seconds, downwards: what is older is left out when it is shown.
    return (
        [f"{option}={datetime.fromtimestamp(int(since_s), UTC):%Y-%m-%dT%H:%M:%SZ}"]
        if since_s
        else []
    )


def _read_from(command: Sequence[str]) -> Iterator[str]:
    """Lines of a command's output and errors, which is where containers' stderr comes."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise missing_tool(command[0]) from error
    try:
        assert process.stdout is not None
        yield from process.stdout
    finally:
        process.kill()
        process.wait()
