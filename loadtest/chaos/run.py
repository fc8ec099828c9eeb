"""Carries out a chaos run, from the start of its services to the evidence that is left of it.

MAIN LOOP: keep everything up, hurt what is due, look, until the run is finished.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from loadtest.chaos.deployment import Deployment
from loadtest.chaos.faults import LEARNER, TEACHER, Fault
from loadtest.chaos.injector import Injector
from loadtest.chaos.logs import LogEvent, LogFollower
from loadtest.chaos.observer import Observer, Sample
from loadtest.chaos.recovery import ROLLOUT_PREFIX, Injury
from sdar.bus.ledger import LedgerAccount
from sdar.cli.run_directory import RunDirectory
from sdar.config import RunConfig
from sdar.contracts.errors import UnavailableError
from sdar.contracts.types import GroupOutcome, MetricRecord
from sdar.environments.sessions import SessionLimits
from sdar.process.settings import apply_environment

log = structlog.get_logger()

_STEP_S = 0.1
_START_TIMEOUT_S = 300.0
_MAX_STILL_S = 300.0
"""How long neither an update nor a fault may come: then the run is stuck."""
_MAX_HURT = 3
"""Targets that may be down at once: on a slow machine faults come later."""
_WAIT_FOR_RECOVERY_S = 60.0
"""A target that has not recovered is left alone for so long, then hit all the same."""
_MEMORY_EVERY_S = 2.0
_REPORT_EVERY_S = 30.0
_SESSIONS_END_TIMEOUT_S = SessionLimits().default_lease_s + 30.0
"""Sessions whose client was killed end with their lease."""
_PROCESSES_END_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Resident memory of one life (process id) with its children, and its signs of work."""

    service: str
    pid: int
    at_s: float
    num_bytes: int
    num_signs: int


@dataclass
class Evidence:
    """All that was seen of a run, for the checks and the report."""

    config: RunConfig
    directory: Path
    injuries: list[Injury] = field(default_factory=list)
    num_planned: int = 0
    events: list[LogEvent] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    num_samples_missed: int = 0
    records: list[MetricRecord] = field(default_factory=list)
    duration_s: float = 0.0
    status: dict[str, Any] = field(default_factory=dict)
    account: LedgerAccount = field(default_factory=LedgerAccount)
    closed: dict[GroupOutcome, list[int]] = field(default_factory=dict)
    num_dead_letters: int = 0
    num_sessions_left: float = -1.0
    not_drained: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    num_restarts: dict[str, int] = field(default_factory=dict)

    def of(self, name: str, service: str = "") -> list[LogEvent]:
        """Log events of one name, of services whose name begins with `service`."""
        return [
            event
            for event in self.events
            if event.name == name and event.service.startswith(service)
        ]


class ChaosRun:
    """One run under `schedule`. Use `run` once."""

    def __init__(
        self, config: RunConfig, root: Path, schedule: list[Fault], say: Callable[[str], None]
    ) -> None:
        self._directory = RunDirectory(root)
        self._schedule = list(schedule)
        self._say = say
        self._marker = uuid.uuid4().hex
        self.evidence = Evidence(config, root, num_planned=len(schedule))
        self._next_memory_s = 0.0
        self._next_report_s = 0.0
        self._began_s = 0.0
        self._num_signs: Counter[str] = Counter()

    def run(self) -> Evidence:
        """To the run's end. Raises UnavailableError: it did not start, or did not end in time."""
        config = self.evidence.config
        apply_environment({"CHAOS_RUN": self._marker})
        with self._directory as directory:
            directory.prepare(config)
            self._deployment = Deployment(config, directory)
            with (
                self._deployment.redis,
                Observer(config, self._deployment.redis.url) as self._observer,
            ):
                self._injector = Injector(self._deployment, self._observer, self.evidence.injuries)
                try:
                    self._start()
                    self._disturb()
                    self._finish()
                finally:
                    self._deployment.fleet.kill()
        self._look_for_orphans()
        return self.evidence

    # ---- up

    def _start(self) -> None:
        deployment = self._deployment
        self._observer.call(deployment.open_links)
        deployment.start(self._marker)
        self._logs = [
            LogFollower(self._directory.logs / f"{name}.log", name) for name in deployment.names
        ]
        self._observer.watch({name: deployment.probe_url(name) for name in deployment.names})
        self._say("Starting all services.")
        self._wait(lambda: not self._list_unready(), _START_TIMEOUT_S)
        unready = self._list_unready()
        if unready:
            raise UnavailableError(
                f"Not ready: {', '.join(unready)}. See the services' logs in "
                f"{self._directory.logs}."
            )
        self._began_s = time.time()
        self._say("All services are ready.")

    def _list_unready(self) -> list[str]:
        """Services that have not answered their readiness probe yet."""
        return sorted(set(self._deployment.names) - self._observer.seen.ready_at_s.keys())

    # ---- the faults

    def _disturb(self) -> None:
        """Do what is planned until the run is finished, and every fault that lasts is over."""
        moved_at = time.monotonic()
        stand = self._find_stand()
        while self._observer.seen.status.get("phase") != "finished" or not self._injector.is_quiet:
            self._turn()
            fault = self._choose_due()
            if fault is not None:
                self._schedule.remove(fault)
                self._say(self._describe(fault))
                self._injector.inject(fault)

            if stand != self._find_stand():
                stand = self._find_stand()
                moved_at = time.monotonic()
            if time.monotonic() > moved_at + _MAX_STILL_S:
                raise UnavailableError(
                    f"The run is stuck: no update and no fault for {_MAX_STILL_S:.0f} s. "
                    f"{self._describe_progress()} after {self._elapsed_s:.0f} s. See the "
                    f"services' logs in {self._directory.logs}."
                )
        self.evidence.duration_s = self._elapsed_s

    def _find_stand(self) -> tuple[int, int]:
        """Updates and faults so far; as long as both stay the same, nothing goes on."""
        return self._observer.seen.status.get("num_updates", 0), len(self.evidence.injuries)

    def _choose_due(self) -> Fault | None:
        """The first due fault whose target can take it; none while Redis or too many are down."""
        hurt = {injury.target for injury in self.evidence.injuries if self._is_hurt(injury)}
        if self._deployment.is_redis_held_down or len(hurt) >= _MAX_HURT:
            return None
        for fault in self._schedule:
            if self._is_due(fault) and self._can_take(fault):
                return fault
        return None

    def _is_due(self, fault: Fault) -> bool:
        status = self._observer.seen.status
        progress = status.get("num_updates", 0) / self.evidence.config.training.num_updates
        # No fault comes while Redis is away, and what is left comes later.
        elapsed_s = self._elapsed_s - self._injector.away_s
        return elapsed_s >= fault.at_s or progress >= fault.at_progress

    def _can_take(self, fault: Fault) -> bool:
        """Whether its target is up and has recovered from what was done to it before."""
        if not self._deployment.is_running(fault.target):
            return False
        own = [injury for injury in self.evidence.injuries if injury.target == fault.target]
        return not any(map(self._is_hurt, own))

    def _is_hurt(self, injury: Injury) -> bool:
        """Whether its target has not recovered yet, and is still waited for."""
        if injury.is_closed:
            return False
        return injury.over_s is None or time.time() - injury.over_s <= _WAIT_FOR_RECOVERY_S

    # ---- one turn

    def _turn(self) -> None:
        """Keep everything up, end what has lasted long enough, take in what there is to see."""
        for name in self._deployment.keep_up():
            self._say(f"{name} was started again.")
        self._injector.end_due()
        self._take_in()
        if self._observer.failure is not None:
            raise self._observer.failure

        now = time.monotonic()
        if now >= self._next_memory_s:
            self._next_memory_s = now + _MEMORY_EVERY_S
            self._weigh()
        if now >= self._next_report_s:
            self._next_report_s = now + _REPORT_EVERY_S
            self._say(self._describe_progress())
        time.sleep(_STEP_S)

    def _take_in(self) -> None:
        """Read the logs on, and note what they and the probes say of targets that are hurt."""
        new: list[LogEvent] = []
        for follower in self._logs:
            new += follower.read()
        self.evidence.events += new
        self._num_signs.update(event.service for event in new if is_sign(event))

        for injury in self.evidence.injuries:
            if not injury.is_closed:
                self._look_for_recovery(injury, [e for e in new if e.service == injury.target])

    def _look_for_recovery(self, injury: Injury, new: list[LogEvent]) -> None:
        """In this order: a worker counts as ready only with its engine, as resumed once ready."""
        seen = self._observer.seen
        for event in new:
            if event.name == "engine_started":
                injury.see_engine(event.at_s, float(event.fields["duration_s"]))

        injury.see_ready(seen.ready_at_s.get(injury.target, 0.0))

        for event in new:
            if is_sign(event):
                injury.see_sign(event.at_s)
        injury.see_sign(seen.sign_at_s.get(injury.target, 0.0))

    def _weigh(self) -> None:
        """Sample the memory of every service that is at work."""
        now_s = time.time()
        for name in self._deployment.names:
            # A starting process grows, and that is no leak.
            if now_s - self._observer.seen.ready_at_s.get(name, 0.0) >= _MEMORY_EVERY_S:
                continue
            pid = self._deployment.pid(name)
            num_bytes = self._deployment.resident_bytes(name)
            if pid is not None and num_bytes is not None:
                sample = MemorySample(name, pid, now_s, num_bytes, self._num_signs[name])
                self.evidence.memory.append(sample)

    def _wait(self, is_true: Callable[[], bool], timeout_s: float) -> bool:
        """Turn until it is true; returns whether it became so in time."""
        deadline_s = time.monotonic() + timeout_s
        while not is_true():
            if time.monotonic() > deadline_s:
                return False
            self._turn()
        return True

    # ---- down

    def _finish(self) -> None:
        """Read the account while everything is up, then end all services as `sdar run` does."""
        evidence = self.evidence
        seen = self._observer.seen

        # Neither wait fails when its time is up: what is left then is evidence for the checks.
        self._wait(self._is_everyone_ready_again, _START_TIMEOUT_S)
        self._wait(lambda: seen.env_gauges.get("sdar_env_sessions") == 0.0, _SESSIONS_END_TIMEOUT_S)

        evidence.num_sessions_left = seen.env_gauges.get("sdar_env_sessions", -1.0)
        evidence.status = seen.status
        evidence.account = self._observer.read_account()
        evidence.closed = self._observer.list_closed()
        evidence.num_dead_letters = self._observer.catch_up()
        evidence.samples = seen.samples
        evidence.num_samples_missed = seen.num_samples_missed
        evidence.records = seen.records

        evidence.not_drained = self._deployment.stop()
        self._take_in()
        evidence.num_restarts = dict(self._deployment.num_restarts)

    def _is_everyone_ready_again(self) -> bool:
        injuries = self.evidence.injuries
        return all(injury.is_overtaken or injury.ready_s is not None for injury in injuries)

    def _look_for_orphans(self) -> None:
        """Children that notice their parent's end get a moment for it."""
        deadline_s = time.monotonic() + _PROCESSES_END_TIMEOUT_S
        left = self._deployment.list_left(self._marker)
        while left and time.monotonic() < deadline_s:
            time.sleep(_STEP_S)
            left = self._deployment.list_left(self._marker)

        self.evidence.orphans = [
            f"{process.pid} {' '.join(process.cmdline())[:200]}" for process in left
        ]
        for process in left:
            process.kill()

    # ---- progress

    @property
    def _elapsed_s(self) -> float:
        return time.time() - self._began_s if self._began_s else 0.0

    def _describe(self, fault: Fault) -> str:
        number = len(self.evidence.injuries) + 1
        lasting = f" for {fault.duration_s:g} s" if fault.duration_s else ""
        what = f"fault {number}/{self.evidence.num_planned}: {fault.kind} {fault.target}{lasting}"
        return f"{what}; {self._describe_progress()}"

    def _describe_progress(self) -> str:
        status = self._observer.seen.status
        return (
            f"{status.get('num_updates', 0)}/{self.evidence.config.training.num_updates} updates, "
            f"phase {status.get('phase', 'unknown')}"
        )


_SIGNS = {ROLLOUT_PREFIX: "group_played", TEACHER: "batch_scored", LEARNER: "batch_trained"}


def is_sign(event: LogEvent) -> bool:
    """Whether a log line shows that its service did its part of the run."""
    return any(
        event.service.startswith(service) and event.name == name for service, name in _SIGNS.items()
    )
