"""The hysteresis between what a signal asks for and what is done. Pure; one for each workload.

Bounds are kept at once. Within them a size changes only after several looks in a row have agreed on
the direction, some time after the last change, and not upwards while replicas that were asked for
are still missing. Up goes as far as the signal asks, down one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from .file import Workload
from .signals import Advice

LOOKS_UP = 3
LOOKS_DOWN = 12
"""Too many replicas cost money, too few cost the whole run's time: down needs more agreement."""
SETTLE_S = 60.0
"""Before this a change doesn't show in the signals."""
MISSING_S = 600.0
"""A replica that doesn't come for so long (no node has room) holds up no judgement of the others.
"""


@dataclass(frozen=True, slots=True)
class Decision:
    """The size a workload is to have now, and the sentence that says why; `advised` is what its
    signal asks for.
    """

    replicas: int
    advised: int
    reason: str


class Governor:
    """Args: now_s: Unix time; signals are believed some time after it."""

    def __init__(self, now_s: float) -> None:
        self.steady_since_s = now_s
        """Since when the size is what it is, with all replicas there. What was measured before says
        nothing about it.
        """
        self._direction = 0
        self._num_agreeing = 0
        self._missing_since_s: float | None = None

    def note_change(self, now_s: float) -> None:
        """The size was changed: what was measured before is void."""
        self.steady_since_s = now_s
        self._missing_since_s = None
        self._direction = 0
        self._num_agreeing = 0

    def note_missing(self, now_s: float, num_missing: int) -> None:
        """Take in how many replicas were asked for and are not heard from.

        Without them nothing that is measured counts, for at most `MISSING_S`.
        """
        if not num_missing:
            self._missing_since_s = None
            return
        self._missing_since_s = now_s if self._missing_since_s is None else self._missing_since_s
        if now_s - self._missing_since_s < MISSING_S:
            self.steady_since_s = now_s

    def decide(self, now_s: float, workload: Workload, replicas: int, advice: Advice) -> Decision:
        """What to do at this look; to be called once a look."""
        # Bounds are a person's decision and wait for nothing.
        if replicas != workload.clamp(replicas):
            wanted = workload.clamp(replicas)
            reason = f"{replicas} replicas are outside the bounds {workload.min} to {workload.max}."
            return Decision(wanted, wanted, reason)
        if workload.min == workload.max:
            return Decision(replicas, replicas, f"Its size is fixed at {workload.min}.")
        wanted = workload.clamp(advice.replicas)
        direction = (wanted > replicas) - (wanted < replicas)
        # Counted at every look, also while something else holds the change up.
        self._num_agreeing = self._num_agreeing + 1 if direction == self._direction else 1
        self._direction = direction
        if direction == 0:
            at_bound = " That is its bound." if advice.replicas != wanted else ""
            return Decision(replicas, advice.replicas, advice.reason + at_bound)
        if hindrance := self._find_hindrance(now_s, direction):
            return Decision(replicas, advice.replicas, f"{advice.reason} Not yet: {hindrance}.")
        # Down one at a time, so that each step is measured before the next.
        return Decision(wanted if direction > 0 else replicas - 1, advice.replicas, advice.reason)

    def _find_hindrance(self, now_s: float, direction: int) -> str:
        """Why the size may not change in that direction yet; empty if it may."""
        if direction > 0 and self._missing_since_s is not None:
            return "not all replicas that were asked for are heard from"
        if (settling_s := self.steady_since_s + SETTLE_S - now_s) > 0:
            return f"the last change settles for {settling_s:.0f} s more"
        missing = (LOOKS_UP if direction > 0 else LOOKS_DOWN) - self._num_agreeing
        return f"{missing} more looks have to agree" if missing > 0 else ""
