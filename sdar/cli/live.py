"""Shows a run while it goes on: as a live table, as plain lines, or as lines of JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sdar.cli.metrics_log import MetricsLog
from sdar.cli.report import describe_change, select_updates
from sdar.config import RunConfig
from sdar.process.text import escape_controls

_LINE_EVERY_S = 10.0
_PACE_UPDATES = 20
"""How many of the newest updates the time left is estimated from."""
_SHOWN_IN_LINES = (
    "update",
    "success (training)",
    "success (held out)",
    "tokens/s",
    "staleness",
    "gate",
    "time left",
)


class View(Protocol):
    """Where a run's progress is shown."""

    def say(self, message: str) -> None: ...

    def starting(self, waiting: list[str]) -> None: ...

    def show(self, status: dict[str, Any], metrics: MetricsLog, wall_s: float) -> None: ...

    def finished(self, summary: dict[str, Any], report: Path) -> None: ...

    def close(self) -> None: ...


def compute_figures(status: dict[str, Any], metrics: MetricsLog, wall_s: float) -> dict[str, str]:
    """The numbers of the live view by name, formatted; '-' where nothing is known yet."""
    learner = metrics.latest("learner")
    rollout = metrics.latest("rollout")
    done = status["num_updates"]
    target = status["target_updates"]
    return {
        "update": f"{done} of {target}",
        "time left": _format_left(metrics, done, target),
        "success (training)": (
            f"{_format(learner, 'success_mean')} of all played, "
            f"{_format(learner, 'trained_success_mean')} of those trained"
        ),
        "success (held out)": _format_held_out(status["evaluations"]),
        "reward": _format(learner, "reward_mean"),
        "tokens/s": (
            f"sampled {_format(rollout, 'tokens_per_s', 0)}, trained "
            f"{_format(learner, 'tokens_per_s', 0)}"
        ),
        "staleness": (
            f"mean {_format(learner, 'staleness_mean')}, max "
            f"{_format(learner, 'staleness_max', 0)} of at most {status['max_staleness']}"
        ),
        "gate": f"mean {_format(learner, 'gate_mean')}, gap {_format(learner, 'teacher_gap_mean')}",
        "queues": _format_queues(status["stream_lags"]),
        "ledger": _format_ledger(status),
        "alarms": "; ".join(_list_alarms(status)) or "none",
        "wall clock": _format_s(wall_s),
    }


def _format_held_out(evaluations: list[dict[str, Any]]) -> str:
    """Success of the first sampled evaluation and of the newest one."""
    found = [one for one in evaluations if one["is_complete"] and not one["is_greedy"]]
    if not found:
        return "-"
    first = _format_success(found[0])
    newest = _format_success(found[-1])
    # Also where the first is the newest.
    if first == newest:
        return first
    return f"{first} -> {newest}"


def _format_success(evaluation: dict[str, Any]) -> str:
    low, high = evaluation["interval"]
    return f"{evaluation['success']:.2f} [{low:.2f}, {high:.2f}]"


def _format_queues(lags: dict[str, Any]) -> str:
    lengths = []
    for name, lag in lags.items():
        length = lag["num_undelivered"] + lag["num_pending"]
        lengths.append(f"{name} {length:.0f}")
    return ", ".join(lengths)


def _format_ledger(status: dict[str, Any]) -> str:
    numbers = [f"{name} {number}" for name, number in status["ledger"].items() if number]
    return f"{', '.join(numbers)}, gap {status['ledger_gap']}"


def _list_alarms(status: dict[str, Any]) -> list[str]:
    return [escape_controls(f"{alarm['name']}: {alarm['message']}") for alarm in status["alarms"]]


class LiveView:
    """A table that redraws itself, for terminals."""

    def __init__(self, config: RunConfig, console: Console | None = None) -> None:
        self._console = console or Console()
        self._title = (
            f"{config.name}: {config.method.name} on {config.environment.name}, seed {config.seed}"
        )
        self._live = Live(Text(self._title), console=self._console, refresh_per_second=4)
        self._live.start()

    def say(self, message: str) -> None:
        self._live.console.print(escape_controls(message, keep="\n"), highlight=False, markup=False)

    def starting(self, waiting: list[str]) -> None:
        self._live.update(
            Text(f"Starting, waiting for {', '.join(waiting)} (vLLM takes half a minute)")
        )

    def show(self, status: dict[str, Any], metrics: MetricsLog, wall_s: float) -> None:
        table = Table.grid(padding=(0, 2))
        for name, value in compute_figures(status, metrics, wall_s).items():
            table.add_row(Text(name, style="dim"), Text(value))

        total = max(1, status["target_updates"])
        bar = ProgressBar(total=total, completed=status["num_updates"], width=60)
        # A bare bar would share its line with what follows.
        row = Table.grid()
        row.add_row(bar)

        title = Text(f"{self._title} ({status['phase']})", style="bold")
        self._live.update(Group(title, row, table))

    def finished(self, summary: dict[str, Any], report: Path) -> None:
        self._console.print(format_summary(summary, report), highlight=False, markup=False)

    def close(self) -> None:
        self._live.stop()


class LineView:
    """A line now and then, for logs and pipes."""

    def __init__(self, config: RunConfig) -> None:
        self._last_line_at = 0.0
        # What was printed last, so that it is printed again only after a change.
        self._last_waiting: list[str] = []
        self._last_alarms: list[str] = []

    def say(self, message: str) -> None:
        print(escape_controls(message, keep="\n"), flush=True)

    def starting(self, waiting: list[str]) -> None:
        if waiting != self._last_waiting:
            print(f"waiting for {', '.join(waiting)}", flush=True)
        self._last_waiting = waiting

    def show(self, status: dict[str, Any], metrics: MetricsLog, wall_s: float) -> None:
        names = [alarm["name"] for alarm in status["alarms"]]
        if names != self._last_alarms:
            alarms = "; ".join(_list_alarms(status)) or "none any more"
            print(f"alarms: {alarms}", flush=True)
        self._last_alarms = names

        if time.monotonic() - self._last_line_at < _LINE_EVERY_S:
            return
        self._last_line_at = time.monotonic()
        figures = compute_figures(status, metrics, wall_s)
        print("  ".join(f"{name}: {figures[name]}" for name in _SHOWN_IN_LINES), flush=True)

    def finished(self, summary: dict[str, Any], report: Path) -> None:
        print(format_summary(summary, report), flush=True)

    def close(self) -> None:
        """Does nothing: nothing is held open."""


class JsonView:
    """One JSON object a line, for programs."""

    def __init__(self) -> None:
        # What was printed last, so that only a change is printed.
        self._last: tuple[object, ...] = ()

    def say(self, message: str) -> None:
        self._emit("message", message=message)

    def starting(self, waiting: list[str]) -> None:
        now = ("starting", *waiting)
        if self._last != now:
            self._emit("starting", waiting=waiting)
        self._last = now

    def show(self, status: dict[str, Any], metrics: MetricsLog, wall_s: float) -> None:
        alarms = [alarm["name"] for alarm in status["alarms"]]
        now = ("update", status["num_updates"], status["phase"], *alarms)
        if self._last != now:
            self._emit(
                "update", wall_s=round(wall_s, 1), status=status, learner=metrics.latest("learner")
            )
        self._last = now

    def finished(self, summary: dict[str, Any], report: Path) -> None:
        self._emit("finished", summary=summary, report=str(report))

    def close(self) -> None:
        """Does nothing: nothing is held open."""

    def _emit(self, event: str, **fields: object) -> None:
        print(json.dumps({"event": event, **fields}), flush=True)


def format_summary(summary: dict[str, Any], report: Path) -> str:
    """The end of a run in a few lines."""
    temperature = f"{summary['evaluation_temperature']:g}"
    ledger = ", ".join(f"{name} {number}" for name, number in summary["ledger"].items())
    lines = [
        f"Finished {summary['num_updates']} updates in {_format_s(summary['wall_s'])}.",
        _describe_success(summary, "success", f"sampled at T={temperature}"),
        _describe_success(summary, "greedy_success", "greedy"),
        f"Staleness at most {summary['staleness_max']} of {summary['max_staleness']} allowed.",
        f"Ledger: {ledger}.",
        f"Report: {report}",
    ]
    return "\n".join(lines)


def _describe_success(summary: dict[str, Any], name: str, label: str) -> str:
    before = _format_with_interval(summary, f"{name}_before")
    after = _format_with_interval(summary, f"{name}_after")
    return (
        f"Held-out success, {label}: {before} -> {after} "
        f"({summary['num_evaluation_episodes']} episodes): "
        f"{describe_change(summary[f'{name}_change_interval'])}"
    )


def _format_with_interval(summary: dict[str, Any], name: str) -> str:
    low, high = summary[f"{name}_interval"]
    return f"{summary[name]:.3f} [{low:.3f}, {high:.3f}]"


def _format(values: dict[str, float], name: str, digits: int = 2) -> str:
    return f"{values[name]:.{digits}f}" if name in values else "-"


def _format_s(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _format_left(metrics: MetricsLog, done: int, target: int) -> str:
    """Time left at the pace of the newest updates."""
    updates = select_updates(metrics.records())[-_PACE_UPDATES:]
    # The time between two updates alone says little of the pace.
    if len(updates) < 3 or done >= target:
        return "-"
    pace_s = (updates[-1]["at_s"] - updates[0]["at_s"]) / (len(updates) - 1)
    return _format_s(pace_s * (target - done))
