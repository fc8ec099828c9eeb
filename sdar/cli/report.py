"""What is left to read after a run: summary.json, plots and report.html, from what it wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from sdar.cli.metrics_log import MetricsLog, read_metrics
from sdar.cli.places import Place, open_gateway_at
from sdar.cli.plots import DARK, LIGHT, Plot, Record, RunData, draw_plots
from sdar.cli.run_directory import RunDirectory
from sdar.config import RunConfig, load_config, save_config
from sdar.contracts.errors import ConfigurationError, UnavailableError
from services.gateway.evaluation import compute_change_interval

_UPDATE_METRIC = "success_mean"
"""A learner's record that holds it is about one update."""


_LAST_UPDATES = 10
"""Updates at the end of a run over which the summary pools success in training."""


def build_summary(
    config: RunConfig, status: dict[str, Any], records: list[Record], wall_s: float
) -> dict[str, Any]:
    """What a run came to.

    Args:
        status: the gateway's answer to GET /v1/run after the run finished.
        records: metric records of all services, oldest first.

    Raises:
        UnavailableError: the status holds no complete evaluation.
    """
    evaluations = [e for e in status["evaluations"] if e["is_complete"]]
    updates = select_updates(records)
    staleness_max = int(max(_values(updates, "staleness_max"), default=0))
    before, after = (
        _pick(evaluations, is_greedy=False, is_last=is_last) for is_last in (False, True)
    )
    greedy_before, greedy_after = (
        _pick(evaluations, is_greedy=True, is_last=is_last) for is_last in (False, True)
    )
    return {
        "name": config.name,
        "method": config.method.name,
        "seed": config.seed,
        "success_before": before["success"],
        "success_before_interval": before["interval"],
        "success_after": after["success"],
        "success_after_interval": after["interval"],
        "greedy_success_before": greedy_before["success"],
        "greedy_success_before_interval": greedy_before["interval"],
        "greedy_success_after": greedy_after["success"],
        "greedy_success_after_interval": greedy_after["interval"],
        "success_change_interval": _compute_change(before, after),
        "greedy_success_change_interval": _compute_change(greedy_before, greedy_after),
        "evaluation_temperature": config.evaluation.temperature,
        "num_evaluation_episodes": after["num_episodes"],
        **_pool_success(updates[-_LAST_UPDATES:]),
        "num_updates": status["num_updates"],
        "wall_s": round(wall_s, 1),
        "staleness_mean": _mean(_values(updates, "staleness_mean")),
        "staleness_max": staleness_max,
        "max_staleness": config.training.max_staleness,
        # While tokens of version v - s are trained at version v, episodes of every version in
        # between are on their way.
        "num_policy_versions_in_flight_max": staleness_max + 1,
        "num_policy_versions_in_batch_max": int(
            max(_values(updates, "num_policy_versions"), default=1)
        ),
        "ledger": {**status["ledger"], "gap": status["ledger_gap"]},
        "ledger_gap_ids": status["ledger_gap_ids"],
        "dead_letters": status["dead_letters"],
        "by_task_type": {"before": before["by_task_type"], "after": after["by_task_type"]},
        "reward_components": {
            "before": before["reward_components"],
            "after": after["reward_components"],
        },
        "evaluations": evaluations,
    }


def _pool_success(updates: list[Record]) -> dict[str, float]:
    """Success in training over some updates: of all episodes played, and of those trained."""
    pooled = {}
    pairs = (("success_mean", "num_episodes"), ("trained_success_mean", "num_trajectories"))
    for name, count in pairs:
        values = [update["values"] for update in updates if count in update["values"]]
        total = sum(each[count] for each in values)
        if total:
            pooled[name] = sum(each[name] * each[count] for each in values) / total
    return pooled


def describe_change(interval: Sequence[float]) -> str:
    """What the 95% interval of a change of success lets one say."""
    low, high = interval
    if low > 0:
        return f"rose, by {low:.3f} to {high:.3f}"
    if high < 0:
        return f"fell, by {-high:.3f} to {-low:.3f}"
    return f"no clear change ({low:+.3f} to {high:+.3f})"


def select_updates(records: list[Record]) -> list[Record]:
    """The learner's records that are about one update each."""
    return [r for r in records if r["service"] == "learner" and _UPDATE_METRIC in r["values"]]


def fetch_run(place: Place, directory: Path) -> None:
    """Put what a report is made of into `directory`: configuration and metrics, and the summary of
    a run that is finished.

    Repeated, it fetches what is new.

    Raises:
        ConfigurationError: the directory is in use for something else.
    """
    with open_gateway_at(place) as gateway, RunDirectory(directory) as run:
        status = gateway.get("/v1/run")
        config = RunConfig.model_validate(gateway.get("/v1/run/configuration"))
        is_ours = not run.checkpoints.exists() and (
            not run.config.exists() or load_config(run.config).name == config.name
        )
        if not is_ours:
            raise ConfigurationError(
                f"{directory} holds another run. Give a directory of its own for that of "
                f"{config.name}."
            )
        save_config(config, run.config)
        metrics = MetricsLog(run.metrics)
        is_more = True
        while (
            is_more
        ):  # a running run always has a few more: only a full page is followed by another
            query = metrics.query()
            page = gateway.get("/v1/metrics", **query)
            metrics.extend(page)
            is_more = len(page) == query["limit"]
        if status["phase"] == "finished":
            wall_s = status["finished_at_s"] - status["started_at_s"]
            run.write_json(run.summary, build_summary(config, status, metrics.records(), wall_s))


def write_report(run_dir: Path) -> Path:
    """Draw the plots and write report.html of a run directory, finished or not; returns the
    report's path.

    Raises:
        ConfigurationError: that is no run directory.
    """
    directory = RunDirectory(run_dir)
    if not directory.config.is_file():
        raise ConfigurationError(
            f"{run_dir} holds no config.yaml, so it is no run directory. Give the path runs/<name>."
        )
    config = load_config(directory.config)
    summary = (
        json.loads(directory.summary.read_text(encoding="utf-8"))
        if directory.summary.exists()
        else {}
    )
    records = read_metrics(directory.metrics)
    data = RunData(
        updates=select_updates(records),
        rollout=[r for r in records if r["service"] == "rollout"],
        evaluations=summary.get("evaluations", []),
        max_staleness=config.training.max_staleness,
    )
    directory.plots.mkdir(exist_ok=True)
    plots = draw_plots(data, directory.plots)
    path = directory.root / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_render(config, summary, plots, directory), encoding="utf-8")
    temporary.rename(path)
    return path


def _pick(evaluations: list[dict[str, Any]], *, is_greedy: bool, is_last: bool) -> dict[str, Any]:
    found = sorted(
        (e for e in evaluations if e["is_greedy"] is is_greedy), key=lambda e: int(e["num_updates"])
    )
    if not found:
        raise UnavailableError(
            f"The run has no complete {'greedy' if is_greedy else 'sampled'} evaluation, so there "
            "is nothing to sum up. "
            "Let it finish; the gateway's log says what its evaluations wait for."
        )
    return found[-1 if is_last else 0]


def _values(records: list[Record], name: str) -> list[float]:
    return [record["values"][name] for record in records if name in record["values"]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# ---- the page


def _render(
    config: RunConfig, summary: dict[str, Any], plots: list[Plot], directory: RunDirectory
) -> str:
    title = f"{config.name}: {config.method.name} on {config.environment.name}"
    parts = [f"<h1>{escape(title)}</h1>", _render_lead(config, summary)]
    if summary:
        parts.append(_render_tiles(summary))
    parts += [_render_plot(plot, directory) for plot in plots]
    if summary:
        tables = (_render_evaluations, _render_task_types, _render_components, _render_ledger)
        parts += [render(summary) for render in tables]
    parts.append(_render_configuration(directory))
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(parts))


def _compute_change(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float]:
    low, high = compute_change_interval(
        before["success"], before["interval"], after["success"], after["interval"]
    )
    return low, high


def _render_lead(config: RunConfig, summary: dict[str, Any]) -> str:
    if not summary:
        text = (
            f"Not finished yet. Method {config.method.name}, seed {config.seed}, "
            f"{config.training.num_updates} updates planned."
        )
        return f"<p class=lead>{escape(text)}</p>"
    text = (
        f"{summary['num_updates']} updates in {_format_s(summary['wall_s'])}, seed "
        f"{summary['seed']}. Success on "
        f"{summary['num_evaluation_episodes']} fixed held-out tasks, with 95% Wilson intervals."
    )
    return f"<p class=lead>{escape(text)}</p>"


def _render_tiles(summary: dict[str, Any]) -> str:
    temperature = f"T={summary['evaluation_temperature']:g}"
    change, greedy_change = (
        describe_change(summary[f"{name}_change_interval"])
        for name in ("success", "greedy_success")
    )
    tiles = [
        (f"held-out success, {temperature}", _format_change(summary, "success"), change),
        ("held-out success, greedy", _format_change(summary, "greedy_success"), greedy_change),
        (
            "staleness of trained tokens",
            f"{summary['staleness_mean']:.2f} mean",
            f"at most {summary['staleness_max']}, bound {summary['max_staleness']}",
        ),
        (
            "groups trained",
            str(summary["ledger"].get("trained", 0)),
            f"unexplained: {summary['ledger']['gap']}",
        ),
    ]
    cells = [
        f"<div class=tile><span>{escape(label)}</span><strong>{escape(value)}</strong>"
        f"<span>{escape(note)}</span></div>"
        for label, value, note in tiles
    ]
    return f"<div class=tiles>{''.join(cells)}</div>"


def _render_plot(plot: Plot, directory: RunDirectory) -> str:
    folder = directory.plots.name
    return (
        f"<figure><h2>{escape(plot.title)}</h2><picture>"
        f'<source srcset="{folder}/{plot.name}{DARK.suffix}.png" media="(prefers-color-scheme: '
        'dark)">'
        f'<img src="{folder}/{plot.name}{LIGHT.suffix}.png" '
        f'alt="{escape(plot.description)}"></picture>'
        f"<figcaption>{escape(plot.description)}</figcaption></figure>"
    )


def _render_evaluations(summary: dict[str, Any]) -> str:
    rows = [
        [
            e["num_updates"],
            f"v{e['policy_version']}",
            "greedy" if e["is_greedy"] else f"T={summary['evaluation_temperature']:g}",
            f"{e['success']:.3f}",
            f"{e['interval'][0]:.3f} to {e['interval'][1]:.3f}",
            e["num_episodes"],
            e["num_failed"],
        ]
        for e in sorted(summary["evaluations"], key=lambda e: (e["num_updates"], e["is_greedy"]))
    ]
    header = ["updates", "policy", "sampling", "success", "95% interval", "episodes", "not played"]
    return _render_table("Evaluations", header, rows)


def _render_task_types(summary: dict[str, Any]) -> str:
    before, after = summary["by_task_type"]["before"], summary["by_task_type"]["after"]
    rows = []
    for kind in sorted(before.keys() | after.keys()):
        (won, played), (won2, played2) = before.get(kind, (0, 0)), after.get(kind, (0, 0))
        rows.append([kind, _format_share(won, played), _format_share(won2, played2)])
    return _render_table("By task type", ["task type", "before", "after"], rows)


def _render_components(summary: dict[str, Any]) -> str:
    before, after = summary["reward_components"]["before"], summary["reward_components"]["after"]
    rows = [
        [name, f"{before.get(name, 0.0):.3f}", f"{after.get(name, 0.0):.3f}"]
        for name in sorted(before.keys() | after.keys())
    ]
    return _render_table(
        "Reward components, mean per episode", ["component", "before", "after"], rows
    )


def _render_ledger(summary: dict[str, Any]) -> str:
    rows = [[name, number] for name, number in summary["ledger"].items()]
    return _render_table("Ledger of training groups", ["outcome", "groups"], rows)


def _render_configuration(directory: RunDirectory) -> str:
    text = directory.config.read_text(encoding="utf-8")
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"


def _render_table(title: str, header: list[str], rows: list[list[Any]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return (
        f"<section><h2>{escape(title)}</h2><div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _format_change(summary: dict[str, Any], name: str) -> str:
    return f"{summary[f'{name}_before']:.3f} → {summary[f'{name}_after']:.3f}"


def _format_share(won: int, played: int) -> str:
    return f"{won / played:.2f} ({won} of {played})" if played else "-"


def _format_s(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f8fa; --card: #ffffff; --text: #1f2328; --muted: #656d76; --line: #e4e7eb;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #161b22; --text: #e6edf3; --muted: #9198a1; --line: #2f363f; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text); font: 15px/1.55 system-ui, sans-serif;
}
main { max-width: 860px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .75rem; }
.lead { color: var(--muted); margin: 0 0 1.5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .75rem; }
.tile, figure, section, details {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem 1.25rem;
}
.tile { display: flex; flex-direction: column; gap: .15rem; }
.tile span { color: var(--muted); font-size: .85rem; }
.tile strong { font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
figure, section, details { margin: 1rem 0 0; }
img { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: .85rem; margin-top: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap;
}
th { color: var(--muted); font-weight: 500; font-size: .85rem; }
tbody tr:last-child td { border-bottom: 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; margin: .75rem 0 0; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
