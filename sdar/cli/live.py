"""What is shown while a run goes on: a live table, plain lines, or JSON lines. Decides nothing."""

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
from sdar.cli.report import describe_change
from sdar.config import RunConfig
from sdar.process.text import escape_controls

_LINE_EVERY_S = 10.0


class View(Protocol):
    """Where a run's progress is shown."""

    def say(self, message: str) -> None: ...

    def starting(self, waiting: list[str]) -> None: ...

    def show(self, status: dict[str, Any], metrics: MetricsLog, wall_s: float) -> None: ...

    def finished(self, summary: dict[str, Any], report: Path) -> None: ...

    def close(self) -> None: ...


def compute_figures(status: dict[str, Any], metrics: MetricsLog, wall_s: float) -> dict[str, str]:
    """The numbers of the live view by name, formatted; '-' where nothing is known yet."""
    learner, rollout = metrics.latest("learner"), metrics.latest("rollout")
    done, target = status["num_updates"], status["target_updates"]
    lags = status["stream_lags"]
    ledger = status["ledger"]
    evaluations = [e for e in status["evaluations"] if e["is_complete"] and not e["is_greedy"]]
    held_out = [
        f"{e['success']:.2f} [{e['interval'][0]:.2f}, {e['interval'][1]:.2f}]" for e in evaluations
    ]
    return {
        "update": f"{done} of {target}",
        "time left": _format_left(metrics, done, target),
        "success (training)": (
            f"{_format(learner, 'success_mean')} of all played, "
            f"{_format(learner, 'trained_success_mean')} of those trained"
        ),
        "success (held out)": " -> ".join(dict.fromkeys([*held_out[:1], *held_out[-1:]])) or "-",
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
        "queues": ", ".join(
            f"{name} {lag['num_undelivered'] + lag['num_pending']:.0f}"
            for name, lag in lags.items()
        ),
        "ledger": ", ".join(f"{name} {number}" for name, number in ledger.items() if number)
        + f", gap {status['ledger_gap']}",
        "alarms": "; ".join(_list_alarms(status)) or "none",
        "wall clock": _format_s(wall_s),
    }


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
        bar = Table.grid()  # a bare bar would share its line with what follows
        bar.add_row(
            ProgressBar(
                total=max(1, status["target_updates"]), completed=status["num_updates"], width=60
            )
        )
        self._live.update(
            Group(Text(f"{self._title} ({status['phase']})", style="bold"), bar, table)
        )

    def finished(self, summary: dict[str, Any], report: Path) -> None:
        self._console.print(format_summary(summary, report), highlight=False, markup=False)

    def close(self) -> None:
        self._live.stop()


class LineView:
    """A line now and then, for logs and pipes."""

    def __init__(self, config: RunConfig) -> None:
        self._last_line_at = 0.0
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
            print(f"alarms: {'; '.join(_list_alarms(status)) or 'none any more'}", flush=True)
        self._last_alarms = names
        if time.monotonic() - self._last_line_at < _LINE_EVERY_S:
            return
        self._last_line_at = time.monotonic()
        figures = compute_figures(status, metrics, wall_s)
        shown = (
            "update",
            "success (training)",
            "success (held out)",
            "tokens/s",
            "staleness",
            "gate",
            "time left",
        )
        print("  ".join(f"{name}: {figures[name]}" for name in shown), flush=True)

    def finished(self, summary: dict[str, Any], report: Path) -> None:
        print(format_summary(summary, report), flush=True)

    def close(self) -> None:
        """Nothing is held open."""


class JsonView:
    """One JSON object a line, for programs."""

    def __init__(self) -> None:
        self._last: tuple[object, ...] = ()

    def say(self, message: str) -> None:
        self._emit("message", message=message)

    def starting(self, waiting: list[str]) -> None:
        if self._last != ("starting", *waiting):
            self._emit("starting", waiting=waiting)
        self._last = ("starting", *waiting)

    def show(self, status: dict[str, Any], metrics: MetricsLog, wall_s: float) -> None:
        now = (
            "update",
            status["num_updates"],
            status["phase"],
            *(alarm["name"] for alarm in status["alarms"]),
        )
        if self._last != now:
            self._emit(
                "update", wall_s=round(wall_s, 1), status=status, learner=metrics.latest("learner")
            )
        self._last = now

    def finished(self, summary: dict[str, Any], report: Path) -> None:
        self._emit("finished", summary=summary, report=str(report))

    def close(self) -> None:
        """Nothing is held open."""

    def _emit(self, event: str, **fields: object) -> None:
        print(json.dumps({"event": event, **fields}), flush=True)


def format_summary(summary: dict[str, Any], report: Path) -> str:
    """The end of a run in a few lines."""
    lines = [f"Finished {summary['num_updates']} updates in {_format_s(summary['wall_s'])}."]
    for name, label in (
        ("success", "sampled at T=" + f"{summary['evaluation_temperature']:g}"),
        ("greedy_success", "greedy"),
    ):
        before, after = summary[f"{name}_before"], summary[f"{name}_after"]
        low, high = summary[f"{name}_before_interval"]
        low2, high2 = summary[f"{name}_after_interval"]
        lines.append(
            f"Held-out success, {label}: {before:.3f} [{low:.3f}, {high:.3f}] -> {after:.3f} "
            f"[{low2:.3f}, {high2:.3f}] "
            f"({summary['num_evaluation_episodes']} episodes): "
            f"{describe_change(summary[f'{name}_change_interval'])}"
        )
    lines.append(
        f"Staleness at most {summary['staleness_max']} of {summary['max_staleness']} allowed."
    )
    lines.append(
        "Ledger: "
        + ", ".join(f"{name} {number}" for name, number in summary["ledger"].items())
        + "."
    )
    lines.append(f"Report: {report}")
    return "\n".join(lines)


def _format(values: dict[str, float], name: str, digits: int = 2) -> str:
    return f"{values[name]:.{digits}f}" if name in values else "-"


def _format_s(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _format_left(metrics: MetricsLog, done: int, target: int) -> str:
    """Time left at the pace of the newest updates."""
    updates = [
        record for record in metrics.records("learner") if "success_mean" in record["values"]
    ][-20:]
    if len(updates) < 3 or done >= target:
        return "-"
    pace_s = (updates[-1]["at_s"] - updates[0]["at_s"]) / (len(updates) - 1)
    return _format_s(pace_s * (target - done))
