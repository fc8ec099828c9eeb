"""What can be looked up afterwards: metrics of every service and the newest trajectories.

Bounded; decides nothing.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice

import structlog

from sdar.bus.protocol import BEFORE_FIRST, Bus, Entry, parse_entry_id
from sdar.contracts import codec
from sdar.contracts.errors import SdarError, UnknownResourceError
from sdar.contracts.roles import Role
from sdar.contracts.streams import Stream
from sdar.contracts.types import MetricRecord, ScoredTrajectory

log = structlog.get_logger()

_PAGE = 2000
"""Entries read in one round, so that a gateway that starts late catches up step by step."""
_TRAJECTORY_PAGE = 100
"""A trajectory can weigh megabytes."""
_INSTANCE_SILENCE_S = 30.0
"""A process that did not report for so long is not counted: workers report every few seconds."""
_FIGURES = (
    "success_mean",
    "num_episodes",
    "trained_success_mean",
    "num_trajectories",
    "engine_mismatch_abs",
    "policy_behavior_gap_abs",
)
"""What is said of the newest update; docs/metrics.md explains each."""
_LOOKED_BACK = 20
"""Learner's records among which the newest update is looked for."""
_SKIPPED = "num_skipped_steps_in_a_row"
_PROBE = "probe_mismatch"
"""A rollout worker's: how far its engine is from the learner on the probe of its version."""
_MAX_SKEW_S = 60.0
"""Records come in about the order of their times: machines' clocks differ, and a record may wait
for Redis.
"""


@dataclass(frozen=True, slots=True)
class MetricEntry:
    """A metric record and its place in the stream, which readers pass back to go on from there."""

    entry_id: str
    record: MetricRecord


@dataclass(frozen=True, slots=True)
class Misread:
    """Episodes in which no action was valid, and how the newest of them began."""

    num_episodes: int
    response: str


class History:
    """Follows the metrics and trajectory streams, without a consumer group: it holds nothing back.

    A trajectory that was finished and trimmed before this process looked is missing here, which is
    fine for looking and no basis for counting.
    """

    def __init__(
        self,
        trajectory_stream: Stream,
        *,
        max_metrics: int = 50_000,
        max_trajectories: int = 500,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.metrics: deque[MetricEntry] = deque(maxlen=max_metrics)
        self._trajectory_stream = trajectory_stream
        self._trajectories: OrderedDict[str, ScoredTrajectory] = OrderedDict()
        self._max_trajectories = max_trajectories
        self._cursors = dict.fromkeys((Stream.METRICS, trajectory_stream), BEFORE_FIRST)
        self._last_seen: dict[tuple[str, str], float] = {}
        self._clock = clock

    async def follow(self, bus: Bus) -> None:
        """Take in what is new."""
        for entry in await self._read(bus, Stream.METRICS, _PAGE):
            try:
                record = codec.decode_metric_record(entry.payload)
            except SdarError as error:
                log.error("metric_record_unreadable", entry_id=entry.entry_id, error=str(error))
                continue
            self.metrics.append(MetricEntry(entry.entry_id, record))
            self._last_seen[record.service, record.instance] = record.at_s
        for entry in await self._read(bus, self._trajectory_stream, _TRAJECTORY_PAGE):
            try:
                scored = self._decode(entry.payload)
            except SdarError:
                continue  # its consumer dead-letters it and says why
            self._trajectories[scored.trajectory.trajectory_id] = scored
            while len(self._trajectories) > self._max_trajectories:
                self._trajectories.popitem(last=False)

    async def _read(self, bus: Bus, stream: Stream, max_count: int) -> list[Entry]:
        entries = await bus.tail(stream, self._cursors[stream], max_count)
        if entries:
            self._cursors[stream] = entries[-1].entry_id
        return entries

    def count_instances(self, service: str) -> int:
        """Processes of a service heard from lately."""
        return len(self.list_instances(service))

    def list_instances(self, service: str) -> set[str]:
        """Names of the processes of a service heard from lately."""
        oldest = self._clock() - _INSTANCE_SILENCE_S
        return {
            instance
            for (name, instance), at_s in self._last_seen.items()
            if name == service and at_s >= oldest
        }

    def last_heard_s(self, service: str) -> float | None:
        """Unix time of the newest record of a service; None before the first."""
        heard = (at_s for (name, _), at_s in self._last_seen.items() if name == service)
        return max(heard, default=None)

    def newest_values(self, service: str, count: int) -> list[dict[str, float]]:
        """Values of a service's newest records, newest first."""
        records = (entry.record for entry in reversed(self.metrics))
        found = (record.values for record in records if record.service == service)
        return list(islice(found, count))

    def newest_record(self, service: str) -> MetricRecord | None:
        """A service's newest record; None before the first."""
        records = (entry.record for entry in reversed(self.metrics))
        return next((record for record in records if record.service == service), None)

    def collect_figures(self) -> dict[str, float]:
        """What the newest records hold of whether training is right, by the names of
        docs/metrics.md; what was not measured is left out.
        """
        records = self.newest_values(Role.LEARNER, _LOOKED_BACK)
        # A batch of which every step was skipped is reported, too, with little else.
        update = next((values for values in records if "success_mean" in values), {})
        figures = {name: update[name] for name in _FIGURES if name in update}
        if records and _SKIPPED in records[0]:
            figures[_SKIPPED] = records[0][_SKIPPED]
        oldest_s = self._clock() - _INSTANCE_SILENCE_S
        newest_of_workers = (
            values[0] for values in self.values_since(Role.ROLLOUT, oldest_s).values()
        )
        probes = [values[_PROBE] for values in newest_of_workers if _PROBE in values]
        # The worst: each worker serves weights of its own.
        return figures | ({_PROBE: max(probes, key=_rank_worst)} if probes else {})

    def values_since(self, service: str, since_s: float) -> dict[str, list[dict[str, float]]]:
        """Values of a service's records since a Unix time, newest first, by instance."""
        found: dict[str, list[dict[str, float]]] = {}
        for entry in reversed(self.metrics):
            record = entry.record
            if record.at_s < since_s - _MAX_SKEW_S:
                break
            # One that is older may stand before one that isn't.
            if record.service == service and record.at_s >= since_s:
                found.setdefault(record.instance, []).append(record.values)
        return found

    def metrics_after(self, entry_id: str, limit: int) -> list[MetricEntry]:
        """Metric records after an entry id, oldest first."""
        after = parse_entry_id(entry_id)
        found: list[MetricEntry] = []
        for entry in reversed(self.metrics):
            if parse_entry_id(entry.entry_id) <= after:
                break
            found.append(entry)
        return found[::-1][:limit]

    def trajectory_ids(self, limit: int) -> list[str]:
        """The newest trajectories' ids, newest first."""
        return list(reversed(self._trajectories))[:limit]

    def find_misread(self) -> Misread | None:
        """The newest episodes if none of their turns had a valid action; None otherwise."""
        played = [scored.trajectory for scored in self._trajectories.values()]
        turns = chain.from_iterable(trajectory.turns for trajectory in played)
        if not played or any(turn.is_action_valid for turn in turns):
            return None
        return Misread(len(played), played[-1].turns[0].response_text)

    def trajectory(self, trajectory_id: str) -> ScoredTrajectory:
        """Raises UnknownResourceError if it isn't among the newest."""
        found = self._trajectories.get(trajectory_id)
        if found is None:
            raise UnknownResourceError(
                f"Trajectory {trajectory_id} is not among the newest {self._max_trajectories} this "
                "gateway has seen.",
                trajectory_id=trajectory_id,
            )
        return found

    def _decode(self, payload: bytes) -> ScoredTrajectory:
        if self._trajectory_stream is Stream.SCORED:
            return codec.decode_scored_trajectory(payload)
        return ScoredTrajectory(codec.decode_trajectory(payload), None)


def _rank_worst(value: float) -> float:
    """Its place among others: no number at all is the worst."""
    return value if math.isfinite(value) else math.inf
