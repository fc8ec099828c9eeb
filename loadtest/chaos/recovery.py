"""When a fault is over, and when its target has recovered from it. Pure.

A fault hurts from `began_s` until `over_s`: a kill is over at once, a pause at SIGCONT, an outage
when connections are let through again. Recovery counts from `over_s` on, twice:

- ready: the service answers its readiness probe (Redis: a read).
- resumed: the service does its part of the run again. The sign of it is, by service:
  - rollout: a group generated and committed by that worker; where the worker or its engine was
    killed, by the next engine
  - teacher: a batch scored
  - learner: an optimizer update
  - envs: an episode opened by a client
  - gateway: the run's status answered
  - redis: a commit of any service
"""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.chaos.faults import Fault, FaultKind

ROLLOUT_PREFIX = "rollout-"


@dataclass
class Injury:
    """A fault as it was done. Times are Unix seconds, None: not yet.

    `engine_start_s` is what the engine reported for its own start, where a rollout worker had to
    start one. `is_overtaken`: the next fault came before the target had recovered.
    """

    fault: Fault
    began_s: float
    over_s: float | None = None
    ready_s: float | None = None
    resumed_s: float | None = None
    engine_start_s: float | None = None
    is_overtaken: bool = False
    held_entries: tuple[str, ...] = ()
    """Ids of the task groups that the worker held when it was hit."""

    @property
    def target(self) -> str:
        return self.fault.target

    @property
    def is_closed(self) -> bool:
        return self.is_overtaken or self.resumed_s is not None

    @property
    def needs_engine(self) -> bool:
        """Whether the worker goes on only with another engine."""
        is_rollout = self.target.startswith(ROLLOUT_PREFIX)
        return is_rollout and self.fault.kind in (FaultKind.KILL, FaultKind.KILL_CHILD)

    @property
    def ready_after_s(self) -> float | None:
        if self.ready_s is None or self.over_s is None:
            return None
        return self.ready_s - self.over_s

    @property
    def resumed_after_s(self) -> float | None:
        if self.resumed_s is None or self.over_s is None:
            return None
        return self.resumed_s - self.over_s

    def see_engine(self, at_s: float, duration_s: float) -> None:
        """Note that the target's engine started, if it is the one that the fault made necessary."""
        if self.needs_engine and self.engine_start_s is None and self._is_after(at_s):
            self.engine_start_s = duration_s

    def see_ready(self, at_s: float) -> None:
        """Note an answer to the readiness probe; it counts once the target has its engine."""
        has_engine = not self.needs_engine or self.engine_start_s is not None
        if self.ready_s is None and has_engine and self._is_after(at_s):
            self.ready_s = at_s

    def see_sign(self, at_s: float) -> None:
        """Note a sign of work; it counts once the target is ready, as older work may end late."""
        if self.resumed_s is None and self.ready_s is not None and self._is_after(at_s):
            self.resumed_s = max(at_s, self.ready_s)

    def _is_after(self, at_s: float) -> bool:
        """Whether that was after the fault; while it lasts, nothing is."""
        return self.over_s is not None and at_s > self.over_s
