"""The plots of a run's metrics and evaluations, as PNG files for light and for dark pages.

Draws what it is given and computes nothing but smoothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""A metric record as the gateway lists it: service, instance, policy_version, at_s, values."""

_SIZE_INCHES = (7.2, 3.6)
_DOTS_PER_INCH = 150
_SMOOTHING_UPDATES = 8
_MOST_STRETCHES = 40
_SHORTEST_STRETCH_S = 10.0


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one set of plots; `suffix` is appended to their file names."""

    suffix: str
    background: str
    text: str
    muted: str
    grid: str
    series: tuple[str, str, str]


LIGHT = Theme("", "#ffffff", "#1f2328", "#656d76", "#e4e7eb", ("#1f6feb", "#bc4c00", "#1a7f37"))
DARK = Theme("-dark", "#161b22", "#e6edf3", "#9198a1", "#2f363f", ("#58a6ff", "#f0883e", "#3fb950"))


@dataclass(frozen=True, slots=True)
class RunData:
    """What is drawn: the learner's records with an update in them, the rollout workers', and
    finished evaluations.
    """

    updates: Sequence[Record]
    rollout: Sequence[Record]
    evaluations: Sequence[dict[str, Any]]
    max_staleness: int

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(update number, value) of a learner metric, where it was reported."""
        numbers = []
        found = []
        for index, record in enumerate(self.updates):
            if name in record["values"]:
                numbers.append(index + 1.0)
                found.append(record["values"][name])
        return numbers, found

    def has(self, name: str) -> bool:
        """Whether a learner metric was reported at all."""
        return any(name in record["values"] for record in self.updates)


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawn plot: file stem, what it shows, and a sentence that says it without the picture."""

    name: str
    title: str
    description: str


def draw_plots(data: RunData, directory: Path) -> list[Plot]:
    """Draw every plot there is data for into `directory`, replacing what is there; returns them in
    reading order.
    """
    drawn = []
    for plot, draw, has_data in _plots(data):
        if not has_data:
            continue
        for theme in (LIGHT, DARK):
            with _figure(theme, directory / f"{plot.name}{theme.suffix}.png") as figure:
                draw(figure, theme, data)
        drawn.append(plot)
    return drawn


Drawing = Callable[[Any, Theme, RunData], None]


_SUCCESS = Plot(
    "success",
    "Success",
    "Share of solved tasks: training batches, and held-out evaluations with 95% interval.",
)
_TEACHER = Plot(
    "teacher",
    "Gate and gap",
    "How open the distillation gate is, and the teacher gap in nats per token.",
)
_STALENESS = Plot(
    "staleness",
    "Staleness",
    "Trained tokens by the number of versions their policy was behind the learner.",
)
_THROUGHPUT = Plot(
    "throughput",
    "Throughput",
    "Tokens per second, sampled by all rollout workers and trained by the learner.",
)


def _plots(data: RunData) -> list[tuple[Plot, Drawing, bool]]:
    """Each plot with what draws it, and whether there is data for it."""
    has_success = bool(data.updates or data.evaluations)
    return [
        (_SUCCESS, _draw_success, has_success),
        (_TEACHER, _draw_teacher, data.has("teacher_gap_mean")),
        (_STALENESS, _draw_staleness, data.has("staleness_mean")),
        (_THROUGHPUT, _draw_throughput, data.has("num_tokens")),
    ]


def _draw_success(figure: Any, theme: Theme, data: RunData) -> None:
    axes = figure.subplots()
    x, y = data.series("success_mean")
    axes.plot(x, y, color=theme.muted, alpha=0.35, linewidth=1)
    axes.plot(x, _smooth(y), color=theme.muted, linewidth=1.8, label="training, all played")
    x, y = data.series("trained_success_mean")
    style = (0, (4, 3))
    axes.plot(x, _smooth(y), color=theme.muted, linewidth=1, linestyle=style, label="those trained")

    last = max((one["num_updates"] for one in data.evaluations), default=0) or len(x)
    # Side by side: both kinds are measured at the same updates.
    shift = 0.006 * max(last, 1)
    sampled = [one for one in data.evaluations if not one["is_greedy"]]
    greedy = [one for one in data.evaluations if one["is_greedy"]]
    _draw_evaluations(axes, sampled, -shift, theme.series[0], "o", "held out, sampled")
    _draw_evaluations(axes, greedy, shift, theme.series[1], "D", "held out, greedy")

    axes.set(xlabel="update", ylabel="success", ylim=(-0.02, 1.04))
    _legend(axes, theme, "lower right")


def _draw_evaluations(
    axes: Any,
    evaluations: Sequence[dict[str, Any]],
    shift: float,
    color: str,
    marker: str,
    label: str,
) -> None:
    """Evaluations of one kind with their intervals, `shift` updates beside where they were made."""
    if not evaluations:
        return

    places = []
    values = []
    below = []
    above = []
    for one in evaluations:
        low, high = one["interval"]
        places.append(one["num_updates"] + shift)
        values.append(one["success"])
        # Rounding can put an end of the interval past the value, and matplotlib takes no negative.
        below.append(max(0.0, one["success"] - low))
        above.append(max(0.0, high - one["success"]))

    axes.errorbar(
        places,
        values,
        yerr=(below, above),
        fmt=marker,
        color=color,
        markersize=6,
        capsize=4,
        linewidth=1.6,
        label=label,
    )
    # Two points make a line that says nothing of what lies between.
    if len(evaluations) > 2:
        axes.plot(places, values, color=color, linewidth=0.9, alpha=0.5)


def _draw_teacher(figure: Any, theme: Theme, data: RunData) -> None:
    names = [("teacher_gap_mean", "gap (nats)", theme.series[1], 0.0)]
    # Methods without a gate have a teacher gap all the same.
    if data.has("gate_mean"):
        names.insert(0, ("gate_mean", "gate", theme.series[0], 0.5))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]

    for axes, (name, label, color, level) in zip(panels, names, strict=True):
        x, y = data.series(name)
        # Half open, or a teacher that agrees with the policy.
        axes.axhline(level, color=theme.muted, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot(x, y, color=color, alpha=0.35, linewidth=1)
        axes.plot(x, _smooth(y), color=color, linewidth=1.8)
        axes.set(ylabel=label)

    panels[-1].set(xlabel="update")
    figure.align_ylabels()


def _draw_staleness(figure: Any, theme: Theme, data: RunData) -> None:
    axes = figure.subplots()
    counts = count_tokens_by_staleness(data.updates)
    total = sum(counts.values()) or 1.0
    # The bound is shown even where no token came near it.
    highest = max([*counts, data.max_staleness])
    shares = [100 * counts.get(staleness, 0.0) / total for staleness in range(highest + 1)]

    bars = axes.bar(range(highest + 1), shares, width=0.62, color=theme.series[0])
    labels = [f"{share:.1f}%" if share else "" for share in shares]
    axes.bar_label(bars, labels, color=theme.text, fontsize=9, padding=3)
    _mark_bound(axes, theme, data.max_staleness)

    axes.set(
        xlabel="versions behind the learner",
        ylabel="trained tokens (%)",
        xlim=(-0.6, highest + 1.3),
    )
    axes.set_xticks(range(highest + 1))
    # Room above the highest bar for its label.
    axes.set_ylim(0, max(shares) * 1.15 or 1)
    axes.grid(axis="x", visible=False)


def _mark_bound(axes: Any, theme: Theme, max_staleness: int) -> None:
    """A line between the bars within the bound and those past it."""
    x = max_staleness + 0.5
    axes.axvline(x, color=theme.series[1], linewidth=1.4, linestyle=(0, (4, 3)))
    axes.annotate(
        f"bound {max_staleness}",
        (x, 0.96),
        xycoords=("data", "axes fraction"),
        xytext=(6, 0),
        textcoords="offset points",
        color=theme.series[1],
        fontsize=9,
        va="top",
    )


def _draw_throughput(figure: Any, theme: Theme, data: RunData) -> None:
    axes = figure.subplots()
    began_s = min(record["at_s"] for record in [*data.updates, *data.rollout])
    sampled = count_sampled_tokens(data.rollout)
    trained = [(record["at_s"], record["values"]["num_tokens"]) for record in data.updates]
    _draw_rates(axes, sampled, began_s, theme.series[0], "sampled")
    _draw_rates(axes, trained, began_s, theme.series[1], "trained")

    axes.set(xlabel="minutes", ylabel="tokens per second")
    axes.set_ylim(bottom=0)
    _legend(axes, theme, "best")


def _draw_rates(
    axes: Any, counts: Sequence[tuple[float, float]], began_s: float, color: str, label: str
) -> None:
    if not counts:
        return
    minutes, rates = _compute_rates([(at_s - began_s, number) for at_s, number in counts])
    axes.plot(minutes, rates, color=color, linewidth=1.8, marker="o", markersize=3, label=label)


def count_sampled_tokens(rollout: Sequence[Record]) -> list[tuple[float, float]]:
    """(time, tokens sampled since the record before) of all workers; their counters begin anew when
    they do.
    """
    totals: dict[str, float] = {}
    counts = []
    for record in rollout:
        worker = record["instance"]
        total = record["values"]["num_tokens_generated"]
        before = totals.get(worker, 0.0)
        # A total below the last one is of a worker that began anew at 0.
        if total < before:
            before = 0.0
        counts.append((record["at_s"], total - before))
        totals[worker] = total
    return counts


def _compute_rates(counts: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """(minutes, per second) over equal stretches of time, of (seconds, count) events."""
    end_s = max(at_s for at_s, _ in counts)
    end_s = max(end_s, 1.0)
    # A short run gets few stretches: shorter ones would hold an update or none.
    num_stretches = int(end_s / _SHORTEST_STRETCH_S)
    num_stretches = max(1, min(_MOST_STRETCHES, num_stretches))
    stretch_s = end_s / num_stretches

    sums = [0.0] * num_stretches
    for at_s, number in counts:
        # The last event is at the end of the last stretch, which would be one too many.
        index = min(int(at_s / stretch_s), num_stretches - 1)
        sums[index] += number

    middles_min = [(index + 0.5) * stretch_s / 60 for index in range(num_stretches)]
    return middles_min, [total / stretch_s for total in sums]


def count_tokens_by_staleness(updates: Sequence[Record]) -> dict[int, float]:
    """Trained tokens by staleness, over all updates, from the learner's `staleness_tokens_<n>`
    metrics.
    """
    counts: dict[int, float] = {}
    for record in updates:
        for name, value in record["values"].items():
            head, _, number = name.rpartition("_")
            if head == "staleness_tokens" and number.isdigit():
                counts[int(number)] = counts.get(int(number), 0.0) + value
    return counts


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the last updates, this one included: it never looks ahead."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - _SMOOTHING_UPDATES) : end]
        means.append(sum(window) / len(window))
    return means


def _legend(axes: Any, theme: Theme, place: str) -> None:
    # An empty legend would be a warning in the log.
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, frameon=False, labelcolor=theme.text, fontsize=9)


@contextmanager
def _figure(theme: Theme, path: Path) -> Iterator[Any]:
    """A figure in the theme's colours, written to `path` at the end. It needs no display and leaves
    pyplot's global state alone.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, object] = {
        "font.family": "DejaVu Sans", "font.size": 10, "text.color": theme.text,
        "axes.facecolor": theme.background, "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False,
        "grid.color": theme.grid, "grid.linewidth": 0.8,
        "xtick.color": theme.muted, "xtick.labelsize": 9,
        "ytick.color": theme.muted, "ytick.labelsize": 9, "lines.solid_capstyle": "round",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(
            figsize=_SIZE_INCHES,
            dpi=_DOTS_PER_INCH,
            facecolor=theme.background,
            layout="constrained",
        )
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, facecolor=theme.background)
