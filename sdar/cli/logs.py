"""`sdar logs`: what a run's services log, wherever they run, in the order of time.

A source is one log: a file of `runs/<name>/logs`, a container of Compose, a pod. Services log JSON
in containers and text on one machine; both are shown as text. A line that no service of ours wrote
(Redis, vLLM, a traceback) has the time of the line before it, and its level unless it names one.
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
from typing import Any, NoReturn

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
# 2026-01-31T12:00:00Z [info     ] ...
_OURS = re.compile(r"(\d{4}-\d\d-\d\dT\S+) +\[(\w+) *\]")
# vLLM's begin with a level, in its worker processes after `(EngineCore pid=12)`.
_OTHERS = re.compile(r"(?:\(.*?\) *)?(DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL)\b")
_LOOK_EVERY_S = 2.0
"""How often pods and files that are new are looked for."""
_READ_EVERY_S = 0.2
_MOST_WAITING_LINES = 10_000
# ANSI codes of colours; the sources take them in turn.
_COLOURS = (36, 33, 35, 32, 34, 96, 95, 92)
_LEVEL_COLOURS = {"warning": 33, "error": 31}


_Reader = Callable[[float, bool], Iterator[str]]
"""Reads a log, given the Unix time of the first line that is wanted and whether to wait for more.
Earlier lines may come as well.
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a log.

    Args:
        at_s: Unix time.
        event: what a line of JSON holds; such a line is shown by it, and not by `text`.
    """

    at_s: float
    level: str
    text: str
    event: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """One log.

    Args:
        role: the service; several sources may be of one.
        read: gives its lines.
        is_stamped: each line begins with the time at which the container wrote it.
        is_running: more may come.
    """

    name: str
    role: str
    read: _Reader
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
        UnknownResourceError: there is no such run, release or service.
        ConfigurationError: `since` is not an age.
    """
    since_s = 0.0 if since is None else time.time() - _parse_age(since)

    def look() -> list[Source]:
        return _choose(_list_sources(place, run), service)

    chosen = look()
    width = max(len(source.name) for source in chosen)
    printer = _Printer(level, since_s, is_json, width)
    if is_following:
        _follow_all(look, printer, since_s)
    else:
        _show_once(chosen, printer, since_s)


def _show_once(sources: Sequence[Source], printer: _Printer, since_s: float) -> None:
    # Each source is in the order of time, so the merge holds one line of each and no whole log.
    logs = [_read_once(source, since_s) for source in sources]
    for name, line in heapq.merge(*logs, key=lambda pair: pair[1].at_s):
        printer.show(name, line)


def _follow_all(look: Callable[[], list[Source]], printer: _Printer, since_s: float) -> NoReturn:
    # Bounded: a log that is read faster than it is shown has to wait.
    lines: queue.Queue[tuple[str, Line]] = queue.Queue(_MOST_WAITING_LINES)
    followers = _Followers(look, lines, since_s)
    next_look_s = 0.0
    while True:
        if time.monotonic() >= next_look_s:
            followers.look()
            next_look_s = time.monotonic() + _LOOK_EVERY_S
        with contextlib.suppress(queue.Empty):
            printer.show(*lines.get(timeout=_READ_EVERY_S))


def _read_once(source: Source, since_s: float) -> Iterator[tuple[str, Line]]:
    for line in _parse(source, since_s, is_following=False):
        yield source.name, line


class _Followers:
    """A thread for each source.

    A thread that ends is started again where it was, as long as its source is running. Sources that
    are new get a thread at the next look.
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
        """Follow every source that is there and not followed."""
        for source in self._look_patiently():
            thread = self._threads.get(source.name)
            is_new = thread is None
            # kubectl and docker end now and then, although their container runs on.
            has_ended = thread is not None and not thread.is_alive()
            if is_new or (has_ended and source.is_running):
                thread = threading.Thread(target=self._follow, args=(source,), daemon=True)
                self._threads[source.name] = thread
                thread.start()

    def _look_patiently(self) -> list[Source]:
        try:
            return self._look()
        except (UnknownResourceError, UnavailableError):
            # At the first look there is nothing to follow. Later the release is between two pods,
            # or the API server is away for a moment.
            if not self._threads:
                raise
            return []

    def _follow(self, source: Source) -> None:
        shown_s = self._seen_s.get(source.name, -1.0)
        newest_s = shown_s
        begin_s = max(shown_s, self._since_s)
        for line in _parse(source, begin_s, is_following=True):
            # A source that is read again begins with lines that were shown before.
            if line.at_s > shown_s:
                newest_s = max(newest_s, line.at_s)
                self._seen_s[source.name] = newest_s
                self._lines.put((source.name, line))


class _Printer:
    """Prints the lines that are wanted, as text or as JSON, each source in a colour of its own.

    Args:
        level: the least that is shown.
        width: columns that the names of the sources take.
    """

    def __init__(self, level: str, since_s: float, is_json: bool, width: int) -> None:
        self._least = _LEVELS.index(level)
        self._since_s = since_s
        self._is_json = is_json
        self._width = width
        self._is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._colours: dict[str, int] = {}

    def show(self, name: str, line: Line) -> None:
        is_too_low = _LEVELS.index(line.level) < self._least
        is_too_old = line.at_s < self._since_s
        if is_too_low or is_too_old:
            return

        if self._is_json:
            fields = {"message": line.text} if line.event is None else line.event
            print(json.dumps({"source": name, **fields}), flush=True)
            return

        text = line.text if line.event is None else render_event(line.event)
        # An event's traceback has several lines, an empty line none.
        for part in text.splitlines() or [""]:
            print(self._format(name, line.level, escape_controls(part, keep="\t")), flush=True)

    def _format(self, name: str, level: str, text: str) -> str:
        prefix = f"{name:{self._width}} | "
        if not self._is_coloured:
            return prefix + text
        next_colour = _COLOURS[len(self._colours) % len(_COLOURS)]
        prefix = _paint(prefix, self._colours.setdefault(name, next_colour))
        if level in _LEVEL_COLOURS:
            text = _paint(text, _LEVEL_COLOURS[level])
        return prefix + text


def _paint(text: str, colour: int) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m"


def _parse_age(text: str) -> float:
    found = _AGE.fullmatch(text)
    if found is None:
        raise ConfigurationError(f"--since takes an age such as 30s, 10m, 2h or 1d, got {text!r}.")
    number, unit = found.groups()
    return float(number) * _UNITS_S[unit]


def _parse(source: Source, since_s: float, *, is_following: bool) -> Iterator[Line]:
    """The lines of a source, from about `since_s` on: none is left out, some may be older."""
    # What a line does not say itself, it has from the line before it.
    at_s = 0.0
    level = "info"
    for raw in source.read(since_s, is_following):
        text = raw.rstrip("\r\n")
        if source.is_stamped:
            at_s, text = _split_stamp(text, at_s)

        event = _read_event(text)
        if event is not None:
            at_s = _read_time(str(event.get("timestamp", "")), at_s)
            level = _read_level(str(event.get("level", level)))
        else:
            at_s, level = _read_head(text, at_s, level)
        yield Line(at_s, level, text, event)


def _split_stamp(text: str, at_s: float) -> tuple[float, str]:
    """The container's time of a line and the line itself; `at_s` and all of it without a time."""
    stamp, _, rest = text.partition(" ")
    stamped_s = _read_time(stamp, -1.0)
    if stamped_s < 0:
        return at_s, text
    return stamped_s, rest


def _read_head(text: str, at_s: float, level: str) -> tuple[float, str]:
    """Time and level of a line of text, the given ones where it begins with none."""
    ours = _OURS.match(text)
    if ours is not None:
        return _read_time(ours[1], at_s), _read_level(ours[2])
    other = _OTHERS.match(text)
    if other is not None:
        return at_s, _read_level(other[1])
    if text.startswith("Traceback"):
        return at_s, "error"
    return at_s, level


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
    # Containers write nanoseconds, of which Python reads six digits.
    text = re.sub(r"(\.\d{6})\d+", r"\1", text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return otherwise_s
    if found.tzinfo is None:
        found = found.replace(tzinfo=UTC)
    return found.timestamp()


def _choose(sources: Sequence[Source], service: str | None) -> list[Source]:
    """The sources of a service or of one instance; all of them where none is named."""
    chosen = [source for source in sources if service in (None, source.role, source.name)]
    if chosen:
        return chosen
    if service is None:
        raise UnknownResourceError("Nothing has logged there yet.")

    known: set[str] = set()
    for source in sources:
        known |= {source.role, source.name}
    if not known:
        raise UnknownResourceError(f"Nothing logs as {service!r}. There is nothing here yet.")
    raise UnknownResourceError(
        f"Nothing logs as {service!r}. There are {', '.join(sorted(known))}."
    )


# ---- where logs are


def _list_sources(place: Place, run: str | None) -> list[Source]:
    if place.release:
        return _list_pod_logs(place)
    if place.is_compose:
        return _list_compose_logs()
    return _list_files(place.runs_dir, run)


def _list_files(runs_dir: Path, run: str | None) -> list[Source]:
    directory = RunDirectory(_find_run(runs_dir, run))
    sources = []
    for path in sorted(directory.logs.glob("*.log")):
        role = find_role_name(path.stem)
        sources.append(Source(path.stem, role, _reader_of(path), is_stamped=False))
    for path in directory.redis.glob("*.log"):
        # Redis is no service of the table, and its file may be named otherwise.
        redis = Source("redis", "redis", _reader_of(path), is_stamped=False)
        sources.append(redis)
    return sources


def _find_run(runs_dir: Path, run: str | None) -> Path:
    """The run of that name; without a name the one that is running, or else that logged last."""
    known = {path.parent.name: path.stat().st_mtime for path in runs_dir.glob("*/logs")}
    if run in known:
        return runs_dir / run
    if run is not None:
        names = ", ".join(sorted(known)) or "none"
        raise UnknownResourceError(
            f"No run {run!r} has logged under {runs_dir}. There are {names}."
        )
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
    if running:
        return runs_dir / next(iter(running))
    return runs_dir / max(known, key=lambda name: known[name])


def _reader_of(path: Path) -> _Reader:
    def read(since_s: float, is_following: bool) -> Iterator[str]:
        with path.open(encoding="utf-8", errors="replace") as file:
            # A line of which only a part is in the file yet.
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
    # `docker inspect` of no container at all is an error.
    containers = json.loads(run_tool(["docker", "inspect", *ids])) if ids else []
    labels = [container["Config"]["Labels"] for container in containers]
    roles = [label["com.docker.compose.service"] for label in labels]

    sources = []
    for container, label, role in zip(containers, labels, roles, strict=True):
        # Only services with several containers need the number to tell them apart.
        name = role
        if roles.count(role) > 1:
            name = f"{role}-{label['com.docker.compose.container-number']}"
        read = _reader_of_container(container["Id"])
        is_running = container["State"]["Running"]
        sources.append(Source(name, role, read, is_stamped=True, is_running=is_running))
    return sources


def _reader_of_container(container: str) -> _Reader:
    def read(since_s: float, is_following: bool) -> Iterator[str]:
        options = _list_options("--since", since_s, is_following)
        return _read_from(["docker", "logs", *options, container])

    return read


def _list_pod_logs(place: Place) -> list[Source]:
    sources = []
    for pod in list_pods(place):
        source = _describe_pod(place, pod)
        if source is not None:
            sources.append(source)
    return sources


def _describe_pod(place: Place, pod: dict[str, Any]) -> Source | None:
    """The log of a pod; None of one that was deleted before it logged anything."""
    name = pod["metadata"]["name"]
    role = pod["metadata"]["labels"].get(ROLE, "")
    container = _find_container(pod["status"].get("containerStatuses", []), role)

    waits_for = _find_what_it_waits_for(container)
    if container is None or waits_for:
        if "deletionTimestamp" in pod["metadata"]:
            return None
        read = _reader_of_text(f"WARNING the pod has not started: {waits_for}")
        return Source(name, role, read, is_stamped=True, is_running=False)

    read = _reader_of_pod(place, name, container["name"])
    is_running = "running" in container["state"]
    return Source(name, role, read, is_stamped=True, is_running=is_running)


def _find_container(statuses: list[dict[str, Any]], role: str) -> dict[str, Any] | None:
    """A pod's own container, which is named as its role; else the first one."""
    for status in statuses:
        if status["name"] == role:
            return status
    return statuses[0] if statuses else None


def _find_what_it_waits_for(container: dict[str, Any] | None) -> str:
    """Why a container has never run; empty if it has."""
    if container is None:
        return "not scheduled"
    # One that waits to be restarted has logged before.
    if "waiting" in container["state"] and not container["restartCount"]:
        return container["state"]["waiting"].get("reason") or "waiting"
    return ""


def _reader_of_text(text: str) -> _Reader:
    """One line of our own in place of a log that is not there."""
    return lambda since_s, is_following: iter([f"{datetime.now(UTC).isoformat()} {text}"])


def _reader_of_pod(place: Place, pod: str, container: str) -> _Reader:
    def read(since_s: float, is_following: bool) -> Iterator[str]:
        options = _list_options("--since-time", since_s, is_following)
        return _read_from([*place.kubectl, "logs", pod, f"--container={container}", *options])

    return read


def _list_options(since_option: str, since_s: float, is_following: bool) -> list[str]:
    """Options of `docker logs` and `kubectl logs`, which name only the time differently."""
    options = ["--timestamps"]
    if since_s:
        # Whole seconds, downwards: what is older is left out when it is shown.
        begin = datetime.fromtimestamp(int(since_s), UTC)
        options.append(f"{since_option}={begin:%Y-%m-%dT%H:%M:%SZ}")
    if is_following:
        options.append("--follow")
    return options


def _read_from(command: Sequence[str]) -> Iterator[str]:
    """Lines of a command's output and errors: `docker logs` prints a container's stderr as such."""
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
        # Whoever reads may stop before the end, and a command that follows has none.
        process.kill()
        process.wait()
