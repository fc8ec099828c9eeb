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
_MOST_STRETCHES, _SHORTEST_STRETCH_S = 40, 10.0


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


def _plots(data: RunData) -> list[tuple[Plot, Drawing, bool]]:
    return [
        (
            Plot(
                "success",
                "Success",
                "Share of solved tasks: training batches, and held-out evaluations with 95% "
                "interval.",
            ),
            _draw_success,
            bool(data.updates or data.evaluations),
        ),
        (
            Plot(
                "teacher",
                "Gate and gap",
                "How open the distillation gate is, and the teacher gap in nats per token.",
            ),
            _draw_teacher,
            bool(data.series("teacher_gap_mean")[0]),
        ),
        (
            Plot(
                "staleness",
                "Staleness",
                "Trained tokens by the number of versions their policy was behind the learner.",
            ),
            _draw_staleness,
            bool(data.series("staleness_mean")[0]),
        ),
        (
            Plot(
                "throughput",
                "Throughput",
                "Tokens per second, sampled by all rollout workers and trained by the learner.",
            ),
            _draw_throughput,
            bool(data.series("num_tokens")[0]),
        ),
    ]


def _draw_success(figure: Any, theme: Theme, data: RunData) -> None:
    axes = figure.subplots()
    x, y = data.series("success_mean")
    axes.plot(x, y, color=theme.muted, alpha=0.35, linewidth=1)
    axes.plot(x, _smooth(y), color=theme.muted, linewidth=1.8, label="training, all played")
    x, y = data.series("trained_success_mean")
    style = (0, (4, 3))
    axes.plot(x, _smooth(y), color=theme.muted, linewidth=1, linestyle=style, label="those trained")
    last = max((e["num_updates"] for e in data.evaluations), default=0) or len(x)
    for is_greedy, color, marker, label in (
        (False, theme.series[0], "o", "held out, sampled"),
        (True, theme.series[1], "D", "held out, greedy"),
    ):
        found = [e for e in data.evaluations if e["is_greedy"] is is_greedy]
        if not found:
            continue
        # Side by side: both kinds are measured at the same updates.
        shift = (0.006 if is_greedy else -0.006) * max(last, 1)
        places = [e["num_updates"] + shift for e in found]
        values = [e["success"] for e in found]
        below = [max(0.0, e["success"] - e["interval"][0]) for e in found]
        above = [max(0.0, e["interval"][1] - e["success"]) for e in found]
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
        if len(found) > 2:  # two points make a line that says nothing of what lies between
            axes.plot(places, values, color=color, linewidth=0.9, alpha=0.5)
    axes.set(xlabel="update", ylabel="success", ylim=(-0.02, 1.04))
    _legend(axes, theme, "lower right")


def _draw_teacher(figure: Any, theme: Theme, data: RunData) -> None:
    has_gate = bool(data.series("gate_mean")[0])
    panels = figure.subplots(2 if has_gate else 1, 1, sharex=True, squeeze=False)[:, 0]
    names = [("gate_mean", "gate", theme.series[0], 0.5)] if has_gate else []
    names.append(("teacher_gap_mean", "gap (nats)", theme.series[1], 0.0))
    for axes, (name, label, color, level) in zip(panels, names, strict=True):
        x, y = data.series(name)
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
    highest = max([*counts, data.max_staleness])
    shares = [100 * counts.get(staleness, 0.0) / total for staleness in range(highest + 1)]
    bars = axes.bar(range(highest + 1), shares, width=0.62, color=theme.series[0])
    axes.bar_label(
        bars,
        [f"{share:.1f}%" if share else "" for share in shares],
        color=theme.text,
        fontsize=9,
        padding=3,
    )
    axes.axvline(
        data.max_staleness + 0.5, color=theme.series[1], linewidth=1.4, linestyle=(0, (4, 3))
    )
    axes.annotate(
        f"bound {data.max_staleness}",
        (data.max_staleness + 0.5, 0.96),
        xycoords=("data", "axes fraction"),
        xytext=(6, 0),
        textcoords="offset points",
        color=theme.series[1],
        fontsize=9,
        va="top",
    )
    axes.set(
        xlabel="versions behind the learner",
        ylabel="trained tokens (%)",
        xlim=(-0.6, highest + 1.3),
    )
    axes.set_xticks(range(highest + 1))
    axes.set_ylim(0, max(shares) * 1.15 or 1)
    axes.grid(axis="x", visible=False)


def _draw_throughput(figure: Any, theme: Theme, data: RunData) -> None:
    axes = figure.subplots()
    began = min(record["at_s"] for record in [*data.updates, *data.rollout])
    sampled, trained = (
        count_sampled_tokens(data.rollout),
        [(r["at_s"], r["values"]["num_tokens"]) for r in data.updates],
    )
    for label, counts, color in (
        ("sampled", sampled, theme.series[0]),
        ("trained", trained, theme.series[1]),
    ):
        if counts:
            minutes, rates = _compute_rates([(at_s - began, number) for at_s, number in counts])
            axes.plot(
                minutes, rates, color=color, linewidth=1.8, marker="o", markersize=3, label=label
            )
    axes.set(xlabel="minutes", ylabel="tokens per second")
    axes.set_ylim(bottom=0)
    _legend(axes, theme, "best")


def count_sampled_tokens(rollout: Sequence[Record]) -> list[tuple[float, float]]:
    """(time, tokens sampled since the record before) of all workers; their counters begin anew when
    they do.
    """
    totals: dict[str, float] = {}
    counts = []
    for record in rollout:
        total, before = (
            record["values"]["num_tokens_generated"],
            totals.get(record["instance"], 0.0),
        )
        counts.append((record["at_s"], total - before if total >= before else total))
        totals[record["instance"]] = total
    return counts


def _compute_rates(counts: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """(minutes, per second) over equal stretches of time, of (seconds, count) events."""
    end_s = max(max(at_s for at_s, _ in counts), 1.0)
    num_stretches = max(1, min(_MOST_STRETCHES, int(end_s / _SHORTEST_STRETCH_S)))
    stretch_s = end_s / num_stretches
    sums = [0.0] * num_stretches
    for at_s, number in counts:
        sums[min(int(at_s / stretch_s), num_stretches - 1)] += number
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
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, frameon=False, labelcolor=theme.text, fontsize=9)


@contextmanager
def _figure(theme: Theme, path: Path) -> Iterator[Any]:
    """A figure in the theme's colours, written to `path` at the end; no display and no global state
    of pyplot.
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
