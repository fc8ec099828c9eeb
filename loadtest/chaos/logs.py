"""Reads services' JSON logs while they are written; lines of other programs are passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One event of one service. `at_s` is Unix time."""

    service: str
    name: str
    at_s: float
    fields: dict[str, Any]


class LogFollower:
    """Reads on where it stopped."""

    def __init__(self, path: Path, service: str) -> None:
        self._path = path
        self._service = service
        self._offset = 0
        self._rest = b""

    def read(self) -> Iterator[LogEvent]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)

        # The last line may be there only in part: it waits for its rest.
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            event = parse_line(line, self._service)
            if event is not None:
                yield event


def parse_line(line: bytes, service: str) -> LogEvent | None:
    """None for what is no event."""
    # A line that a kill cut short goes on with the next process' first event: what cannot be read
    # whole is read from the last event in it on.
    for start in (0, max(0, line.rfind(b'{"'))):
        try:
            fields = json.loads(line[start:])
            at_s = datetime.fromisoformat(fields["timestamp"]).timestamp()
            return LogEvent(service, str(fields["event"]), at_s, fields)
        except (ValueError, KeyError, TypeError):
            continue
    return None
