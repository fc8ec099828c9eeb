"""`sdar status`: shows where a run stands, as its gateway reports it, and pauses or stops it."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sdar.cli.gateway import Gateway
from sdar.cli.places import Place, open_gateway_at
from sdar.contracts.errors import UnknownResourceError
from sdar.process.text import escape_controls

# The states in which a group is closed, in the order of the account's second equation.
CLOSING = ("trained", "skipped", "stale", "failed", "cancelled")


def show_status(place: Place, *, is_json: bool) -> None:
    """Print the status of a run, for a person or as JSON."""
    with open_gateway_at(place) as gateway, ThreadPoolExecutor() as pool:
        # Both at once: each way into a container takes a second.
        scaling = pool.submit(_read_scaling, gateway)
        status = gateway.get("/v1/run")
        if is_json:
            print(json.dumps(status), flush=True)
        else:
            Console(highlight=False).print(render_status(status, scaling.result()))


def control_run(place: Place, what: str, *, is_json: bool) -> None:
    """Ask the gateway to pause, resume or stop the run, and say where it stands then."""
    with open_gateway_at(place) as gateway:
        status = gateway.post(f"/v1/run/{what}")
    if is_json:
        text = json.dumps(status)
    else:
        text = escape_controls(
            f"{status['run_id']} is {status['phase']}, update {status['num_updates']} of "
            f"{status['target_updates']}."
        )
    print(text, flush=True)


def _read_scaling(gateway: Gateway) -> dict[str, Any]:
    """How many of each service there are to be."""
    try:
        return dict(gateway.get("/v1/scaling"))
    except UnknownResourceError:
        # The gateway is of a release from before it scaled anything.
        return {"mode": "off"}


def render_status(status: dict[str, Any], scaling: dict[str, Any] | None = None) -> RenderableType:
    """The status as a table. What services and environments wrote is shown as text: no markup, no
    control characters.
    """
    parts = _render_head(status)
    parts += map(_show, format_figures(status["figures"]))
    for alarm in status["alarms"]:
        parts.append(_show(f"{alarm['name']}: {alarm['message']}", "bold red"))

    parts += map(_show, format_ledger(status))
    parts.append(_render_streams(status["stream_lags"]))
    if scaling and scaling["mode"] != "off":
        parts += _render_scaling(scaling)
    if status["evaluations"]:
        parts.append(_render_evaluations(status["evaluations"]))

    for group_id, reason in status["failures"].items():
        parts.append(_show(f"{group_id}: {reason}", "dim"))
    return Group(*parts)


def _render_head(status: dict[str, Any]) -> list[RenderableType]:
    """Which run it is, what it is doing, and how far it is."""
    lines: list[RenderableType] = [
        _show(f"{status['run_id']}: {status['method']}, {status['phase']}", "bold")
    ]
    if status["detail"]:
        lines.append(_show(status["detail"]))
    sleep = status.get("sleep")
    if sleep:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(sleep["since_s"]))
        lines.append(_show(f"asleep since {since}: {sleep['reason']}", "bold"))
    lines += map(_show, format_progress(status))
    return lines


def format_progress(status: dict[str, Any]) -> list[str]:
    """How far the run is, and who is there."""
    bus = status["bus"]
    memory = f"{bus['used_bytes'] / 2**20:.0f}"
    # A Redis without a bound reports 0.
    if bus["max_bytes"]:
        memory += f" of {bus['max_bytes'] / 2**20:.0f}"

    workers = ", ".join(f"{number} {name}" for name, number in status["instances"].items())
    progress = f"update {status['num_updates']} of {status['target_updates']}"
    return [
        f"{progress}, policy version {status['policy_version']}",
        f"heard from lately: {workers}; Redis {bus['state']}, {memory} MiB",
    ]


def format_figures(figures: dict[str, float]) -> list[str]:
    """Whether training is right: success, and how far the sampler is from the learner."""
    lines = []
    if "success_mean" in figures:
        lines.append(
            f"success in training {figures['success_mean']:.3f} of {figures['num_episodes']:.0f} "
            f"played, {figures['trained_success_mean']:.3f} of "
            f"{figures['num_trajectories']:.0f} trained"
        )
    shown = {
        "engine_mismatch_abs": "newest weights",
        "probe_mismatch": "probe",
        "policy_behavior_gap_abs": "all",
    }
    measured = [f"{figures[name]:.1e} {text}" for name, text in shown.items() if name in figures]
    if measured:
        lines.append(f"sampler to learner, nats: {', '.join(measured)}")
    if figures.get("num_skipped_steps_in_a_row"):
        lines.append(
            f"optimizer steps skipped in a row: {figures['num_skipped_steps_in_a_row']:.0f}"
        )
    return lines


def format_ledger(status: dict[str, Any]) -> list[str]:
    """The two equations of the account, and what they do not explain; short enough for a terminal
    of 80 columns.
    """
    ledger = status["ledger"]
    parts = [f"{name} {ledger[name]}" for name in (*CLOSING, "buffered")]
    generated = f"generated {ledger['generated']}"
    lines = [
        f"issued {ledger['issued']} = running {ledger['running']} + {generated}",
        f"{generated} = {' + '.join(parts[:3])}",
        # The second half of the sum, below the first one.
        f"{' ' * len(generated)} + {' + '.join(parts[3:])}",
    ]
    if status["ledger_gap"]:
        lines.append(format_gap(status))
    return lines


def format_gap(status: dict[str, Any]) -> str:
    """A sentence about the groups that the account cannot explain."""
    # Only at its end does the gateway compare the account with every group it issued.
    ids = ", ".join(status["ledger_gap_ids"]) or "which ones is known at the end of the run"
    return f"The account cannot explain {status['ledger_gap']} groups: {ids}."


def _render_streams(lags: dict[str, Any]) -> Table:
    table = Table("stream", "waiting", "in hand", "oldest", box=box.SIMPLE)
    for name, lag in lags.items():
        row = (
            name,
            f"{lag['num_undelivered']:.0f}",
            f"{lag['num_pending']:.0f}",
            f"{lag['oldest_age_s']:.1f} s",
        )
        table.add_row(*map(_show, row))
    return table


def _render_scaling(scaling: dict[str, Any]) -> list[RenderableType]:
    table = Table("workload", "pods", "wanted", "bounds", "because", box=box.SIMPLE)
    for name, workload in scaling["workloads"].items():
        row = (
            name,
            _format_size(workload["current"]),
            _format_size(workload["wanted"]),
            f"{workload['min']} to {workload['max']}",
            workload["reason"],
        )
        table.add_row(*map(_show, row))

    parts: list[RenderableType] = []
    if scaling["problem"]:
        parts.append(_show(scaling["problem"], "bold red"))
    if scaling["dry_run"]:
        parts.append(_show("dry run: sizes are decided and not set"))
    parts.append(table)
    return parts


def _format_size(number: int | None) -> str:
    """A number of pods; "-" before the gateway has seen or decided it."""
    return "-" if number is None else str(number)


def _render_evaluations(evaluations: list[dict[str, Any]]) -> Table:
    table = Table(
        "updates",
        "policy",
        "sampling",
        "success",
        "95% interval",
        "episodes",
        "failed",
        box=box.SIMPLE,
    )
    for one in evaluations:
        success = "-"
        interval = "-"
        # Of no episode, its success would be a 0 that nobody measured.
        if one["num_episodes"]:
            low, high = one["interval"]
            success = f"{one['success']:.3f}"
            interval = f"{low:.3f} to {high:.3f}"
        row = (
            str(one["num_updates"]),
            f"v{one['policy_version']}",
            "greedy" if one["is_greedy"] else "sampled",
            success,
            interval,
            f"{one['num_episodes']} of {one['num_tasks']}",
            str(one["num_failed"]),
        )
        table.add_row(*map(_show, row))
    return table


def _show(text: str, style: str = "") -> Text:
    return Text(escape_controls(text), style=style)
