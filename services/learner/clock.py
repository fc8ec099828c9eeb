"""The wall time of one update by part: waiting, stepping, publishing, checkpointing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from services.learner.metrics import Timing


class UpdateClock:
    """Stopwatches of one update after another."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time spent inside to `part`: wait, step, publish or checkpoint."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] = self._spent.get(part, 0.0) + time.perf_counter() - began

    def take(self) -> Timing:
        """What was measured since the last call."""
        now = time.perf_counter()
        spent = self._spent
        total_s = now - self._began
        self._spent = {}
        self._began = now
        return Timing(
            wait_s=spent.get("wait", 0.0),
            step_s=spent.get("step", 0.0),
            publish_s=spent.get("publish", 0.0),
            checkpoint_s=spent.get("checkpoint", 0.0),
            total_s=total_s,
        )
