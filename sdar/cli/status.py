"""`sdar status`: where a run stands, as its gateway says. Shows, never decides."""

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

CLOSING = ("trained", "skipped", "stale", "failed", "cancelled")


def show_status(place: Place, *, is_json: bool) -> None:
    """Print the status of a run, for a person or as JSON."""
    with open_gateway_at(place) as gateway, ThreadPoolExecutor() as pool:
        # Beside the other: each way into a container takes a second.
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
    told = (
        f"{status['run_id']} is {status['phase']}, update {status['num_updates']} of "
        f"{status['target_updates']}."
    )
    print(json.dumps(status) if is_json else escape_controls(told), flush=True)


def _read_scaling(gateway: Gateway) -> dict[str, Any]:
    """How many of each service there are to be; nothing where the gateway is older than the
    question.
    """
    try:
        return dict(gateway.get("/v1/scaling"))
    except UnknownResourceError:
        return {"mode": "off"}


def render_status(status: dict[str, Any], scaling: dict[str, Any] | None = None) -> RenderableType:
    """The status as a table. What services and environments wrote is shown as text: no markup, no
    control characters.
    """
    parts: list[RenderableType] = [
        _show(f"{status['run_id']}: {status['method']}, {status['phase']}", "bold")
    ]
    if status["detail"]:
        parts.append(_show(status["detail"]))
    if sleep := status.get("sleep"):
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(sleep["since_s"]))
        parts.append(_show(f"asleep since {since}: {sleep['reason']}", "bold"))
    parts += [_show(line) for line in format_progress(status)]
    parts += [_show(line) for line in format_figures(status["figures"])]
    parts += [
        _show(f"{alarm['name']}: {alarm['message']}", "bold red") for alarm in status["alarms"]
    ]
    parts += [_show(line) for line in format_ledger(status)]
    parts.append(_render_streams(status["stream_lags"]))
    if scaling and scaling["mode"] != "off":
        parts += _render_scaling(scaling)
    if status["evaluations"]:
        parts.append(_render_evaluations(status["evaluations"]))
    parts += [
        _show(f"{group_id}: {reason}", "dim") for group_id, reason in status["failures"].items()
    ]
    return Group(*parts)


def format_progress(status: dict[str, Any]) -> list[str]:
    """How far the run is, and who is there."""
    workers = ", ".join(f"{number} {name}" for name, number in status["instances"].items())
    used, most = (status["bus"][name] / 2**20 for name in ("used_bytes", "max_bytes"))
    memory = f"{used:.0f} of {most:.0f} MiB" if most else f"{used:.0f} MiB"
    return [
        (
            f"update {status['num_updates']} of {status['target_updates']}, policy version "
            f"{status['policy_version']}"
        ),
        f"heard from lately: {workers}; Redis {status['bus']['state']}, {memory}",
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
        f"{' ' * len(generated)} + {' + '.join(parts[3:])}",
    ]
    return [*lines, format_gap(status)] if status["ledger_gap"] else lines


def format_gap(status: dict[str, Any]) -> str:
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
        table.add_row(*(_show(cell) for cell in row))
    return table


def _render_scaling(scaling: dict[str, Any]) -> list[RenderableType]:
    table = Table("workload", "pods", "wanted", "bounds", "because", box=box.SIMPLE)
    for name, workload in scaling["workloads"].items():
        current, wanted = (
            "-" if workload[key] is None else str(workload[key]) for key in ("current", "wanted")
        )
        row = (name, current, wanted, f"{workload['min']} to {workload['max']}", workload["reason"])
        table.add_row(*(_show(cell) for cell in row))
    told = [_show(scaling["problem"], "bold red")] if scaling["problem"] else []
    told += [_show("dry run: sizes are decided and not set")] if scaling["dry_run"] else []
    return [*told, table]


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
    for e in evaluations:
        low, high = e["interval"]
        sampling = "greedy" if e["is_greedy"] else "sampled"
        found = (
            (f"{e['success']:.3f}", f"{low:.3f} to {high:.3f}") if e["num_episodes"] else ("-", "-")
        )
        row = [str(e["num_updates"]), f"v{e['policy_version']}", sampling, *found]
        row += [f"{e['num_episodes']} of {e['num_tasks']}", str(e["num_failed"])]
        table.add_row(*(_show(cell) for cell in row))
    return table


def _show(text: str, style: str = "") -> Text:
    return Text(escape_controls(text), style=style)
