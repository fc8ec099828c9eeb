"""The file metrics.jsonl: every service's records, each appended once and read back on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PAGE = 5000


class MetricsLog:
    """Appends records and keeps them in memory for the live view and the report."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records = read_metrics(path)
        # "0-0" is before the first entry of a Redis stream.
        self._after = self._records[-1]["entry_id"] if self._records else "0-0"

    def query(self) -> dict[str, str | int]:
        """Parameters that ask the gateway for what is not here yet."""
        return {"after": self._after, "limit": _PAGE}

    def extend(self, records: list[dict[str, Any]]) -> None:
        if not records:
            return
        with self._path.open("a", encoding="utf-8") as handle:
            for record in records:
                handle.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._records.extend(records)
        self._after = records[-1]["entry_id"]

    def records(self, service: str | None = None) -> list[dict[str, Any]]:
        """All records, or those of one service; oldest first."""
        if service is None:
            return list(self._records)
        return [record for record in self._records if record["service"] == service]

    def latest(self, service: str) -> dict[str, float]:
        """Values of a service's newest record; empty before its first."""
        for record in reversed(self._records):
            if record["service"] == service:
                return dict(record["values"])
        return {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; a last line that a crash cut short is dropped."""
    if not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    # Out of the file too: the next record would be appended to it.
    if rest:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [json.loads(line) for line in lines if line]
