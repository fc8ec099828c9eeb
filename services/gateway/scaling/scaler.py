"""The scaler: every few seconds look at the run, decide sizes, carry them out.

Whatever fails here (the file, the API server, Redis) is logged and tried again at the next look;
the run goes on as it is. Before a change the scheduler commits: a superseded gateway never gets
beyond that, and what the change rests on is saved.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median

import structlog

from sdar.contracts.errors import ConflictError, UnavailableError
from sdar.contracts.roles import SLEEPING, WORKERS, Role
from sdar.contracts.streams import Stream
from sdar.process.lifecycle import wait_or_stop

from ..alarms import BusState
from ..scheduler import Scheduler
from ..state import RunPhase
from ..watch import Watch
from .cluster import Cluster, Size
from .file import ScalingFile, ScalingFileReader, Workload
from .governor import Decision, Governor
from .metrics import CHANGES, ERRORS, IDLE, REPLICAS, ScalingMetrics
from .signals import Advice, Load, Stillness, Values, advise, find_idleness

log = structlog.get_logger()

LOOK_S = 5.0
_CONFIRM_S = 10.0
"""The scheduler commits several times a second; one that doesn't waits for Redis."""
_LEAST_WINDOW_S, _MAX_WINDOW_S = 60.0, 900.0
"""How far back workers' records are looked at. The learner's count for longer where its updates
take longer.
"""
_UPDATES_IN_WINDOW = 3
_NEWEST_UPDATES = 10
_LASTING_LOOKS = 3
"""Looks in a row that failed, after which it is worth an alarm."""
_MAX_ABSENCE_S = 120.0
"""Longer between two looks, and the gateway itself was held up (a suspended machine, a set clock):
it has missed what moved.
"""
_KEPT_CHANGES = 100
_MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class WorkloadStatus:
    """One workload as of the last look.

    Attributes:
        wanted: what it is to have now; `reason` says why, and what a signal asks for beyond that.
        since_s: Unix time since when current and wanted are what they are.
    """

    kind: str
    name: str
    min: int
    max: int
    current: int
    wanted: int
    reason: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a size, made at the Unix time `at_s`."""

    at_s: float
    workload: str
    before: int
    after: int
    reason: str


@dataclass(slots=True)
class _Look:
    """What one look found: the sizes that could be read."""

    now_s: float
    file: ScalingFile
    sizes: dict[Role, Size] = field(default_factory=dict)


class Scaler:
    """Scales one run's workloads.

    Args:
        reader: of the scaling file.
        look_s: time between two looks.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        watch: Watch,
        reader: ScalingFileReader,
        cluster: Cluster,
        metrics: ScalingMetrics | None = None,
        clock: Callable[[], float] = time.time,
        look_s: float = LOOK_S,
    ) -> None:
        self.workloads: dict[Role, WorkloadStatus] = {}
        self.changes: deque[Change] = deque(maxlen=_KEPT_CHANGES)
        self.problem = ""
        self._scheduler = scheduler
        self._watch = watch
        self._reader = reader
        self._cluster = cluster
        self._metrics = metrics or ScalingMetrics()
        self._clock = clock
        self._look_s = look_s
        self._governors: dict[Role, Governor] = {}
        self._num_failed_looks = 0
        self._has_looked = False
        self._looked_at_s = self._present_since_s = clock()

    @property
    def file(self) -> ScalingFile | None:
        """The scaling file in force."""
        return self._reader.file

    async def run(self, stopping: asyncio.Event) -> None:
        """Look every few seconds until `stopping` is set."""
        while not stopping.is_set():
            await self.look()
            await wait_or_stop(stopping, self._look_s)

    async def look(self) -> None:
        """Look now, and act. Never raises for a cluster, a Redis or a file that cannot be used."""
        if await asyncio.to_thread(self._reader.refresh):
            self._metrics.count(ERRORS, cause="file")
        file, now_s = self._reader.file, self._clock()
        if abs(now_s - self._looked_at_s) > _MAX_ABSENCE_S:
            self._present_since_s = now_s
        self._looked_at_s = now_s
        if file is not None and self._scheduler.is_restored:
            try:
                found = await self._scale(_Look(now_s, file))
            except Exception as error:
                # The scaler's boundary: what is wrong with it must not end the run.
                log.exception("scaling_broke")
                found = self._fail("defect", f"Scaling raised {type(error).__name__}: {error}.")
            self._num_failed_looks = self._num_failed_looks + 1 if found else 0
            self.problem = found
        is_lasting = self._num_failed_looks >= _LASTING_LOOKS
        self._watch.scaling_problem = " ".join(
            filter(None, (self._reader.problem, self.problem if is_lasting else ""))
        )
        self._metrics.set(IDLE, self._scheduler.state.sleep is not None)

    async def _scale(self, look: _Look) -> str:
        """Read, decide, act. Returns the newest problem that kept it from that, else empty."""
        managed = look.file.managed
        self.workloads = {
            role: status for role, status in self.workloads.items() if role in managed
        }
        problem = await self._read_sizes(look)
        # Before any decision: what sleeps is to have no replicas, whatever its signal asks for.
        self._guard(look)
        for role, size in look.sizes.items():
            workload = managed[role]
            decision = self._decide(look, role, workload, size)
            self._note(look, role, workload, size.replicas, decision)
            if decision.replicas == size.replicas or look.file.dry_run:
                continue
            try:
                await self._change(role, workload, size, decision)
            except UnavailableError as error:
                problem = self._fail("cluster", error.message)
            except ConflictError as error:
                self._metrics.count(ERRORS, cause="conflict")
                log.info("scaling_conflict", error=error.message)
            except TimeoutError:
                return self._fail(
                    "bus",
                    f"Redis did not confirm within {_CONFIRM_S:g} s that this is the run's "
                    "gateway.",
                )
        return problem

    async def _read_sizes(self, look: _Look) -> str:
        """A workload that can't be read is left alone in this look; returns why, else empty."""
        problem = ""
        for role, workload in look.file.managed.items():
            try:
                look.sizes[role] = await self._cluster.read(workload)
            except UnavailableError as error:
                problem = self._fail("cluster", error.message)
        return problem

    def _fail(self, cause: str, problem: str) -> str:
        self._metrics.count(ERRORS, cause=cause)
        if problem != self.problem:
            log.warning("scaling_failed", cause=cause, error=problem)
        return problem

    # ---- the idle guard

    def _guard(self, look: _Look) -> None:
        """Put an idle run to sleep. Nothing is asked of the workloads yet."""
        scheduler = self._scheduler
        sizes = {str(role): look.sizes[role].replicas for role in SLEEPING if role in look.sizes}
        # A look that cannot see the learner is none.
        is_first, self._has_looked = not self._has_looked, self._has_looked or Role.LEARNER in sizes
        if scheduler.state.sleep or look.file.dry_run or not sizes:
            return
        if is_first and scheduler.is_blank and sizes.get(Role.LEARNER) == 0:
            # Only a sleep takes the learner away, and Redis has lost what was noted of it.
            scheduler.control.fall_asleep(
                "The run slept when this gateway started, and Redis has no memory of it. `sdar "
                "resume` wakes it.",
                {},
            )
        elif reason := self._find_idleness(look):
            scheduler.control.fall_asleep(reason, sizes)

    def _find_idleness(self, look: _Look) -> str:
        scheduler, watch = self._scheduler, self._watch
        still = Stillness(
            now_s=look.now_s,
            phase=scheduler.state.phase,
            detail=scheduler.detail,
            finished_at_s=scheduler.state.finished_at_s,
            paused_at_s=scheduler.state.paused_at_s,
            progress_at_s=watch.progress_at_s,
            bus=watch.condition.state,
            bus_since_s=max(watch.condition.since_s, self._present_since_s),
            learner_busy_s=watch.compute_learner_busy_s(),
        )
        return find_idleness(still, look.file.idle_after_s)

    # ---- deciding

    def _decide(self, look: _Look, role: Role, workload: Workload, size: Size) -> Decision:
        governor = self._governors.setdefault(role, Governor(look.now_s))
        sleep = self._scheduler.state.sleep
        if sleep and role in SLEEPING:
            governor.note_change(look.now_s)
            return Decision(0, 0, sleep.reason)
        if size.replicas == 0:
            wanted = workload.clamp(self._scheduler.state.sizes.get(role, workload.min))
            return Decision(wanted, wanted, "The run is awake.")
        if look.file.dry_run and role in SLEEPING and (idle := self._find_idleness(look)):
            return Decision(0, 0, idle)
        governor.note_missing(look.now_s, self._count_missing(role, size.replicas))
        advice = self._advise(look, role, governor, size.replicas)
        return governor.decide(look.now_s, workload, size.replicas, advice)

    def _advise(self, look: _Look, role: Role, governor: Governor, replicas: int) -> Advice:
        is_running = self._scheduler.state.phase is RunPhase.RUNNING
        if not is_running or self._watch.condition.state is not BusState.OK:
            return Advice(
                replicas,
                "Sizes follow their signals only while the run is running and Redis answers.",
            )
        return advise(role, self._measure(look, governor), replicas)

    def _count_missing(self, role: Role, replicas: int) -> int:
        """Workers that were asked for and are not heard from; the environments report nothing."""
        if role not in WORKERS:
            return 0
        return max(0, replicas - self._scheduler.history.count_instances(role))

    def _measure(self, look: _Look, governor: Governor) -> Load:
        """What was reported since the workload's size last changed, within a window of some
        updates.
        """
        scheduler = self._scheduler
        training = scheduler.config.training
        newest = scheduler.history.newest_values(Role.LEARNER, _NEWEST_UPDATES)
        update_s = median(values.get("total_s", 0.0) for values in newest) if newest else 0.0
        window_s = max(_LEAST_WINDOW_S, _UPDATES_IN_WINDOW * update_s)
        steady_s = look.now_s - governor.steady_since_s
        # A learner that is away says nothing; what it said before it went is no signal.
        updates = scheduler.history.values_since(Role.LEARNER, look.now_s - min(window_s, steady_s))
        workers_since_s = look.now_s - min(window_s, steady_s, _MAX_WINDOW_S)
        lag = self._watch.lags.get(Stream.TRAJECTORIES) if scheduler.config.needs_teacher else None
        workers: dict[str, Mapping[str, Sequence[Values]]] = {}
        for role in WORKERS:
            workers[role] = self._find_workers(role, workers_since_s)
        return Load(
            updates=list(chain.from_iterable(updates.values()))[:_NEWEST_UPDATES],
            workers=workers,
            num_lagging=lag.num_undelivered + lag.num_pending if lag else 0,
            lag_age_s=min(lag.oldest_age_s, steady_s) if lag else 0.0,
            num_admitted=(training.max_staleness + 1)
            * training.groups_per_update
            * training.group_size,
            sessions_per_replica=scheduler.config.environment.capacity,
        )

    def _find_workers(self, service: str, since_s: float) -> Mapping[str, Sequence[Values]]:
        history = self._scheduler.history
        living = history.list_instances(service)
        return {
            name: values
            for name, values in history.values_since(service, since_s).items()
            if name in living
        }

    # ---- acting

    def _note(
        self, look: _Look, role: Role, workload: Workload, current: int, decision: Decision
    ) -> None:
        before = self.workloads.get(role)
        sizes = (current, decision.replicas)
        is_same = before is not None and (before.current, before.wanted) == sizes
        since_s = before.since_s if before is not None and is_same else look.now_s
        bounds = (workload.kind, workload.name, workload.min, workload.max)
        self.workloads[role] = WorkloadStatus(
            *bounds, current, decision.replicas, decision.reason, since_s
        )
        self._metrics.set(REPLICAS, current, workload=role, kind="current")
        self._metrics.set(REPLICAS, decision.replicas, workload=role, kind="wanted")
        # Once for each new advice, and not at every look.
        if look.file.dry_run and not is_same and current != decision.replicas:
            _log_advice(role, current, decision)

    async def _change(self, role: Role, workload: Workload, size: Size, decision: Decision) -> None:
        before, after = size.replicas, decision.replicas
        for attempt in range(_MAX_ATTEMPTS):
            async with asyncio.timeout(_CONFIRM_S):
                await self._scheduler.confirm_tenure()
            if (self._scheduler.state.sleep is not None and role in SLEEPING) is not (after == 0):
                return  # put to sleep or woken meanwhile
            try:
                await self._cluster.resize(workload, size, after)
                break
            except ConflictError:
                # A pod that comes or goes changes the object's status, too; only another size is
                # somebody else's decision.
                size = await self._cluster.read(workload)
                if size.replicas != before or attempt == _MAX_ATTEMPTS - 1:
                    raise
        now_s = self._clock()
        self._governors[role].note_change(now_s)
        self.changes.append(Change(now_s, role, before, after, decision.reason))
        self._metrics.count(CHANGES, workload=role, direction="up" if after > before else "down")
        log.info(
            "workload_scaled", workload=role, before=before, after=after, reason=decision.reason
        )
        change = f"{before} to {after} replicas. {decision.reason}"
        try:
            await self._cluster.leave_event(workload, size, _name_change(before, after), change)
        except (UnavailableError, ConflictError) as error:
            log.warning("event_refused", workload=role, error=error.message)
            self._metrics.count(ERRORS, cause="cluster")


def _log_advice(role: Role, current: int, decision: Decision) -> None:
    log.info(
        "scaling_advised",
        workload=role,
        current=current,
        wanted=decision.replicas,
        reason=decision.reason,
        dry_run=True,
    )


def _name_change(before: int, after: int) -> str:
    """One CamelCase word, as events have for their reason."""
    if after == 0:
        return "Asleep"
    if before == 0:
        return "Awake"
    return "ScaledUp" if after > before else "ScaledDown"
