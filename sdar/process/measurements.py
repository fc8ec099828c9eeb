"""Measurements: declared once, counted, shown to Prometheus, reported in metric records.

A service declares each measurement beside its other ones, and from that one statement it is in
/metrics, on docs/metrics.md, known to the checks of dashboards and alerts and, if it has a key, in
the service's records on the `metrics` stream:

    ROLLOUT = Declarations()
    EPISODES = ROLLOUT.declare(
        Counter("sdar_rollout_episodes_total", "episodes", "Episodes played.", key="num_episodes")
    )
    meters = Meters(ROLLOUT)
    meters.count(EPISODES)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

# Prometheus keeps a series for each value of a label, for ever.
_MAX_LABEL_VALUES = 64
# Two records may fall on one tick of the clock, and a rate divides by the time between them.
_SHORTEST_WINDOW_S = 1e-9

# fmt: off
SECONDS_BUCKETS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300, 600, 1800,
)
# fmt: on
"""For what takes between milliseconds and half an hour."""
TURNS_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100, 128, 256)
"""For an episode's length, the same in every service that counts it."""


@dataclass(frozen=True, slots=True)
class Label:
    """A label of a series.

    `values` are those that a query may ask for by name. They are empty where users name the values
    (task types, environments).
    """

    name: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Measurement:
    """What Prometheus is shown.

    `name` is the name of its series; a histogram's series add `_bucket`, `_sum` and `_count`.
    """

    kind: ClassVar[str]

    name: str
    unit: str
    help: str
    labels: tuple[Label, ...] = ()

    @property
    def series(self) -> dict[str, tuple[Label, ...]]:
        """Names that a query may use, each with its labels."""
        return {self.name: self.labels}


@dataclass(frozen=True, slots=True)
class Counter(Measurement):
    """Only grows.

    Under its `key` records hold the total since the process began, over all labels. Without a key
    they do not hold it.
    """

    kind: ClassVar[str] = "counter"

    key: str = ""

    def __post_init__(self) -> None:
        # Prometheus' client appends `_total` where it is missing, so the declared name would name
        # no series, and a query for it would find nothing.
        if not self.name.endswith("_total"):
            raise ValueError(f"The counter {self.name} must be called {self.name}_total.")


@dataclass(frozen=True, slots=True)
class Gauge(Measurement):
    """Goes up and down. Under its `key` records hold its value; without one they do not."""

    kind: ClassVar[str] = "gauge"

    key: str = ""
    initial: float = 0.0
    """Before it is first set; NaN says that it was not measured yet."""

    def __post_init__(self) -> None:
        if self.key and self.labels:
            raise ValueError(
                f"The gauge {self.name} has labels, so a record cannot hold it under one key "
                f"({self.key}). Declare a Figure for the record."
            )


@dataclass(frozen=True, slots=True)
class Histogram(Measurement):
    kind: ClassVar[str] = "histogram"

    buckets: tuple[float, ...] = SECONDS_BUCKETS

    @property
    def series(self) -> dict[str, tuple[Label, ...]]:
        """Names that a query may use, each with its labels."""
        return {
            f"{self.name}_bucket": (*self.labels, Label("le")),
            f"{self.name}_sum": self.labels,
            f"{self.name}_count": self.labels,
        }


@dataclass(frozen=True, slots=True)
class Figure:
    """What only metric records hold, and Prometheus works out for itself or does not need.

    A part of the key in angle brackets stands for a name or number: `success_<task_type>`.
    """

    key: str
    unit: str
    help: str


Reported: TypeAlias = Counter | Gauge | Figure
"""What a metric record can hold."""
Declared = TypeVar("Declared", bound=Measurement | Figure)
_Shown = TypeVar("_Shown", bound=MetricWrapperBase)


class Declarations:
    """Everything that one service measures, in the order in which it is declared."""

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []
        self.reported: dict[str, Reported] = {}
        """What the service's metric records hold, by key."""

    def declare(self, declared: Declared) -> Declared:
        """Add a measurement; returns it.

        Raises:
            ValueError: its name or its key is taken.
        """
        if isinstance(declared, Measurement):
            if declared.name in {other.name for other in self.measurements}:
                raise ValueError(f"The measurement {declared.name} is declared twice.")
            self.measurements.append(declared)
        if isinstance(declared, Counter | Gauge | Figure) and declared.key:
            if declared.key in self.reported:
                raise ValueError(f"Two measurements are reported under the key {declared.key}.")
            self.reported[declared.key] = declared
        return declared


class Meters:
    """Counts what was declared, shows it to Prometheus, and can be read back.

    Args:
        registry: none makes one of its own, so that several services fit into one process.
    """

    def __init__(
        self, declarations: Declarations, registry: CollectorRegistry | None = None
    ) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self.declarations = declarations
        self._counters: dict[str, prometheus_client.Counter] = {}
        self._gauges: dict[str, prometheus_client.Gauge] = {}
        self._histograms: dict[str, prometheus_client.Histogram] = {}
        self._figures: dict[str, float] = {}
        for measurement in declarations.measurements:
            self._build(measurement)

    def _build(self, measurement: Measurement) -> None:
        name = measurement.name
        text = measurement.help
        labels = [label.name for label in measurement.labels]
        if isinstance(measurement, Counter):
            self._counters[name] = prometheus_client.Counter(
                name, text, labels, registry=self.registry
            )
        elif isinstance(measurement, Histogram):
            self._histograms[name] = prometheus_client.Histogram(
                name, text, labels, registry=self.registry, buckets=measurement.buckets
            )
        elif isinstance(measurement, Gauge):
            self._gauges[name] = prometheus_client.Gauge(name, text, labels, registry=self.registry)
            # One with labels has no series before its first value.
            if not labels:
                self._gauges[name].set(measurement.initial)

    def show_in(self, registry: CollectorRegistry) -> None:
        """Show everything in one more registry."""
        for shown in (self._counters, self._gauges, self._histograms):
            for collector in shown.values():
                registry.register(collector)

    def count(self, counter: Counter, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter; an amount of 0 makes its series, so that the first 1 is seen as an
        increase.
        """
        _select(self._counters[counter.name], labels).inc(amount)

    def set(self, gauge: Gauge | Figure, value: float, **labels: str) -> None:
        """Set the present value of a gauge, or of what only records hold."""
        if isinstance(gauge, Figure):
            self._figures[gauge.key] = float(value)
        else:
            _select(self._gauges[gauge.name], labels).set(value)

    def observe(self, histogram: Histogram, value: float, **labels: str) -> None:
        """Add one value to a histogram."""
        _select(self._histograms[histogram.name], labels).observe(value)

    def read(self, reported: Reported) -> float:
        """The present value, a counter's over all labels; NaN for what was never set."""
        if isinstance(reported, Figure):
            return self._figures.get(reported.key, math.nan)
        name = reported.name
        # A counter's collector also has samples of when each series was made, under another name.
        shown = self._counters[name] if isinstance(reported, Counter) else self._gauges[name]
        samples = [sample for family in shown.collect() for sample in family.samples]
        return float(sum(sample.value for sample in samples if sample.name == name))

    def take_record(self) -> dict[str, float]:
        """The values of a metric record: what has a key and was measured."""
        values = {key: self.read(reported) for key, reported in self.declarations.reported.items()}
        return {key: value for key, value in values.items() if not math.isnan(value)}

    def show_record(self, record: Mapping[str, float]) -> None:
        """Set every gauge whose key is in the record: the reverse of `take_record`."""
        for key, reported in self.declarations.reported.items():
            if isinstance(reported, Gauge) and key in record:
                self.set(reported, record[key])


def _select(shown: _Shown, labels: Mapping[str, str]) -> _Shown:
    return shown.labels(**labels) if labels else shown


class Window:
    """How much counters grew between one metric record and the next, for rates and shares.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, meters: Meters, clock: Callable[[], float] = time.monotonic) -> None:
        self._meters = meters
        self._clock = clock
        self._began_at = clock()
        self._totals = self._read()
        self._growth: dict[str, float] = {}
        self.duration_s = _SHORTEST_WINDOW_S

    def close(self) -> None:
        """End the open window and begin the next one; `growth` is of the one that ended."""
        now = self._clock()
        totals = self._read()
        self.duration_s = max(now - self._began_at, _SHORTEST_WINDOW_S)
        self._growth = {name: total - self._totals[name] for name, total in totals.items()}
        self._began_at = now
        self._totals = totals

    def growth(self, counter: Counter) -> float:
        """What it counted in the window that ended last; 0 before the first has."""
        return self._growth.get(counter.name, 0.0)

    def rate(self, counter: Counter) -> float:
        """Growth a second in the window that ended last."""
        return self.growth(counter) / self.duration_s

    def _read(self) -> dict[str, float]:
        counters = self._meters.declarations.measurements
        return {c.name: self._meters.read(c) for c in counters if isinstance(c, Counter)}


class LabelBound:
    """Keeps a label to a number of values: what users name (task types) may be without end.

    Called with a value, it returns that value, or `other` once there are too many.
    """

    def __init__(self, max_values: int = _MAX_LABEL_VALUES) -> None:
        self._max_values = max_values
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value not in self._known and len(self._known) >= self._max_values:
            return "other"
        self._known.add(value)
        return value
