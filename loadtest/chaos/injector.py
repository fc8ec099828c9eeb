"""Does faults to a running deployment, and ends in time those that last."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from loadtest.chaos.deployment import Deployment
from loadtest.chaos.faults import REDIS, Fault, FaultKind
from loadtest.chaos.observer import Observer
from loadtest.chaos.proxy import Link
from loadtest.chaos.recovery import ROLLOUT_PREFIX, Injury

_LATE_DELIVERY_S = 2.0
"""Less than any service takes to start: its name's entries by then are the killed life's."""
_KILL_AGAIN_AFTER_S = 1.5
_DELAY_S = 0.2


class Injector:
    """Hurts targets one fault at a time, and notes each in `injuries`."""

    def __init__(self, deployment: Deployment, observer: Observer, injuries: list[Injury]) -> None:
        self._deployment = deployment
        self._observer = observer
        self._injuries = injuries
        self._endings: list[tuple[float, Callable[[], None]]] = []
        self.away_s = 0.0
        """Seconds that Redis was held down so far."""

    @property
    def is_quiet(self) -> bool:
        """Whether every fault that lasts has ended."""
        return not self._endings

    def end_due(self) -> None:
        """End what has lasted long enough."""
        now = time.monotonic()
        due = [action for at_s, action in self._endings if at_s <= now]
        self._endings = [ending for ending in self._endings if ending[0] > now]
        for action in due:
            action()

    def inject(self, fault: Fault) -> None:
        """Hurt the target now; what lasts is ended by `end_due`."""
        for injury in self._injuries:
            if injury.target == fault.target and not injury.is_closed:
                injury.is_overtaken = True

        injury = Injury(fault, time.time())
        inject = {
            FaultKind.KILL: self._kill,
            FaultKind.KILL_TWICE: self._kill_twice,
            FaultKind.KILL_CHILD: self._kill_child,
            FaultKind.PAUSE: self._pause,
            FaultKind.SEVER: self._sever,
            FaultKind.REFUSE: self._refuse,
            FaultKind.DELAY: self._delay,
            FaultKind.OUTAGE: self._hold_down,
        }[fault.kind]
        inject(injury)
        self._injuries.append(injury)

    def _kill(self, injury: Injury) -> None:
        self._deployment.kill(injury.target)
        injury.over_s = time.time()
        self._note_held(injury)
        # A read that was waiting when its process died may still be handed an entry, until Redis
        # sees the connection end.
        self._later(_LATE_DELIVERY_S, lambda: self._note_held(injury))

    def _kill_twice(self, injury: Injury) -> None:
        self._deployment.kill(injury.target)

        def again() -> None:
            if self._deployment.is_running(injury.target):
                self._deployment.kill(injury.target)
            injury.over_s = time.time()

        self._later(_KILL_AGAIN_AFTER_S, again)

    def _kill_child(self, injury: Injury) -> None:
        self._deployment.kill_child(injury.target, which=len(self._injuries))
        injury.over_s = time.time()
        self._note_held(injury)

    def _pause(self, injury: Injury) -> None:
        self._deployment.signal_all(injury.target, signal.SIGSTOP)
        self._note_held(injury)

        def go_on() -> None:
            self._deployment.signal_all(injury.target, signal.SIGCONT)
            injury.over_s = time.time()

        self._later(injury.fault.duration_s, go_on)

    def _sever(self, injury: Injury) -> None:
        self._observer.call(self._link(injury).sever)
        injury.over_s = time.time()

    def _refuse(self, injury: Injury) -> None:
        link = self._link(injury)
        self._observer.call(link.close)

        def let_through() -> None:
            self._observer.call(link.open)
            injury.over_s = time.time()

        self._later(injury.fault.duration_s, let_through)

    def _delay(self, injury: Injury) -> None:
        link = self._link(injury)
        link.delay_s = _DELAY_S

        def let_through() -> None:
            link.delay_s = 0.0
            injury.over_s = time.time()

        self._later(injury.fault.duration_s, let_through)

    def _hold_down(self, injury: Injury) -> None:
        self._deployment.is_redis_held_down = True
        self._deployment.kill(REDIS)

        def bring_back() -> None:
            self._deployment.is_redis_held_down = False
            self._deployment.keep_up()
            injury.over_s = time.time()
            self.away_s += injury.over_s - injury.began_s

        self._later(injury.fault.duration_s, bring_back)

    def _link(self, injury: Injury) -> Link:
        return self._deployment.links[injury.target]

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        self._endings.append((time.monotonic() + delay_s, action))

    def _note_held(self, injury: Injury) -> None:
        if injury.target.startswith(ROLLOUT_PREFIX):

            def note(found: list[str]) -> None:
                injury.held_entries = tuple({*injury.held_entries, *found})

            self._observer.find_held(injury.target, note)
