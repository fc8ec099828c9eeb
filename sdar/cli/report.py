"""Writes what is read after a run: summary.json, the plots and report.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdar.cli.metrics_log import MetricsLog, read_metrics
from sdar.cli.places import Place, open_gateway_at
from sdar.cli.plots import DARK, LIGHT, Plot, Record, RunData, draw_plots
from sdar.cli.run_directory import RunDirectory
from sdar.config import RunConfig, load_config, save_config
from sdar.contracts.errors import ConfigurationError, UnavailableError
from services.gateway.evaluation import compute_change_interval

if TYPE_CHECKING:
    from sdar.cli.gateway import Gateway

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
    evaluations = [one for one in status["evaluations"] if one["is_complete"]]
    sampled = _list_of_kind(evaluations, is_greedy=False)
    greedy = _list_of_kind(evaluations, is_greedy=True)
    before = sampled[0]
    after = sampled[-1]

    updates = select_updates(records)
    return {
        "name": config.name,
        "method": config.method.name,
        "seed": config.seed,
        **_sum_up_success("success", sampled),
        **_sum_up_success("greedy_success", greedy),
        "evaluation_temperature": config.evaluation.temperature,
        "num_evaluation_episodes": after["num_episodes"],
        **_pool_success(updates[-_LAST_UPDATES:]),
        "num_updates": status["num_updates"],
        "wall_s": round(wall_s, 1),
        **_sum_up_staleness(updates),
        "max_staleness": config.training.max_staleness,
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


def _list_of_kind(evaluations: list[dict[str, Any]], *, is_greedy: bool) -> list[dict[str, Any]]:
    """The sampled or the greedy evaluations, oldest first; at least one."""
    found = [one for one in evaluations if one["is_greedy"] is is_greedy]
    if not found:
        raise UnavailableError(
            f"The run has no complete {'greedy' if is_greedy else 'sampled'} evaluation, so there "
            "is nothing to sum up. "
            "Let it finish; the gateway's log says what its evaluations wait for."
        )
    return sorted(found, key=lambda one: int(one["num_updates"]))


def _sum_up_success(name: str, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Success in the first and the last of the evaluations, and the interval of its change."""
    before = evaluations[0]
    after = evaluations[-1]
    low, high = compute_change_interval(
        before["success"], before["interval"], after["success"], after["interval"]
    )
    return {
        f"{name}_before": before["success"],
        f"{name}_before_interval": before["interval"],
        f"{name}_after": after["success"],
        f"{name}_after_interval": after["interval"],
        f"{name}_change_interval": (low, high),
    }


def _sum_up_staleness(updates: list[Record]) -> dict[str, Any]:
    staleness_max = int(max(_values(updates, "staleness_max"), default=0))
    versions_in_batch = int(max(_values(updates, "num_policy_versions"), default=1))
    return {
        "staleness_mean": _mean(_values(updates, "staleness_mean")),
        "staleness_max": staleness_max,
        # While tokens of version v - s are trained at version v, episodes of every version in
        # between are on their way.
        "num_policy_versions_in_flight_max": staleness_max + 1,
        "num_policy_versions_in_batch_max": versions_in_batch,
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
    # Only an interval that leaves out 0 shows a change.
    if low > 0:
        return f"rose, by {low:.3f} to {high:.3f}"
    if high < 0:
        return f"fell, by {-high:.3f} to {-low:.3f}"
    return f"no clear change ({low:+.3f} to {high:+.3f})"


def select_updates(records: list[Record]) -> list[Record]:
    """The learner's records that are about one update each."""
    learner = [record for record in records if record["service"] == "learner"]
    return [record for record in learner if _UPDATE_METRIC in record["values"]]


def fetch_run(place: Place, directory: Path) -> None:
    """Put what a report is made of into `directory`: configuration and metrics, and the summary of
    a run that is finished.

    Repeated, it fetches what is new.

    Raises:
        ConfigurationError: the directory is in use for something else.
    """
    with open_gateway_at(place) as gateway, RunDirectory(directory) as run:
        # Before the metrics, so that a run that is finished here has reported its last ones.
        status = gateway.get("/v1/run")
        config = RunConfig.model_validate(gateway.get("/v1/run/configuration"))
        if not _is_for(run, config):
            raise ConfigurationError(
                f"{directory} holds another run. Give a directory of its own for that of "
                f"{config.name}."
            )
        save_config(config, run.config)

        metrics = MetricsLog(run.metrics)
        _fetch_metrics(gateway, metrics)

        if status["phase"] == "finished":
            wall_s = status["finished_at_s"] - status["started_at_s"]
            run.write_json(run.summary, build_summary(config, status, metrics.records(), wall_s))


def _is_for(run: RunDirectory, config: RunConfig) -> bool:
    """Whether the directory is empty, or holds what was fetched of this run before."""
    # Checkpoints are never fetched: a run was trained here.
    if run.checkpoints.exists():
        return False
    return not run.config.exists() or load_config(run.config).name == config.name


def _fetch_metrics(gateway: Gateway, metrics: MetricsLog) -> None:
    # A running run always has a few more records: only a full page is followed by another.
    is_more = True
    while is_more:
        query = metrics.query()
        page = gateway.get("/v1/metrics", **query)
        metrics.extend(page)
        is_more = len(page) == query["limit"]


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
    summary = _read_summary(directory)
    records = read_metrics(directory.metrics)
    data = RunData(
        updates=select_updates(records),
        rollout=[record for record in records if record["service"] == "rollout"],
        evaluations=summary.get("evaluations", []),
        max_staleness=config.training.max_staleness,
    )

    directory.plots.mkdir(exist_ok=True)
    plots = draw_plots(data, directory.plots)
    page = _render(config, summary, plots, directory)

    # A browser that reloads meanwhile sees the old page or the new one, never half of it.
    path = directory.root / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.rename(path)
    return path


def _read_summary(directory: RunDirectory) -> dict[str, Any]:
    """The summary of a finished run; empty before its end."""
    if not directory.summary.exists():
        return {}
    summary: dict[str, Any] = json.loads(directory.summary.read_text(encoding="utf-8"))
    return summary


def _values(records: list[Record], name: str) -> list[float]:
    return [record["values"][name] for record in records if name in record["values"]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# ---- the page


def _render(
    config: RunConfig, summary: dict[str, Any], plots: list[Plot], directory: RunDirectory
) -> str:
    """The whole page. Names come from a configuration, so everything is escaped."""
    title = f"{config.name}: {config.method.name} on {config.environment.name}"
    parts = [f"<h1>{escape(title)}</h1>", _render_lead(config, summary)]
    if summary:
        parts.append(_render_tiles(summary))

    parts += [_render_plot(plot, directory) for plot in plots]
    if summary:
        parts += [
            _render_evaluations(summary),
            _render_task_types(summary),
            _render_components(summary),
            _render_ledger(summary),
        ]
    parts.append(_render_configuration(directory))
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(parts))


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
    tiles = [
        _render_tile(
            f"held-out success, {temperature}",
            _format_change(summary, "success"),
            describe_change(summary["success_change_interval"]),
        ),
        _render_tile(
            "held-out success, greedy",
            _format_change(summary, "greedy_success"),
            describe_change(summary["greedy_success_change_interval"]),
        ),
        _render_tile(
            "staleness of trained tokens",
            f"{summary['staleness_mean']:.2f} mean",
            f"at most {summary['staleness_max']}, bound {summary['max_staleness']}",
        ),
        _render_tile(
            "groups trained",
            str(summary["ledger"].get("trained", 0)),
            f"unexplained: {summary['ledger']['gap']}",
        ),
    ]
    return f"<div class=tiles>{''.join(tiles)}</div>"


def _render_tile(label: str, value: str, note: str) -> str:
    return (
        f"<div class=tile><span>{escape(label)}</span><strong>{escape(value)}</strong>"
        f"<span>{escape(note)}</span></div>"
    )


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
    in_order = sorted(
        summary["evaluations"], key=lambda one: (one["num_updates"], one["is_greedy"])
    )
    rows = []
    for one in in_order:
        low, high = one["interval"]
        temperature = f"T={summary['evaluation_temperature']:g}"
        row = [
            one["num_updates"],
            f"v{one['policy_version']}",
            "greedy" if one["is_greedy"] else temperature,
            f"{one['success']:.3f}",
            f"{low:.3f} to {high:.3f}",
            one["num_episodes"],
            one["num_failed"],
        ]
        rows.append(row)
    header = ["updates", "policy", "sampling", "success", "95% interval", "episodes", "not played"]
    return _render_table("Evaluations", header, rows)


def _render_task_types(summary: dict[str, Any]) -> str:
    before = summary["by_task_type"]["before"]
    after = summary["by_task_type"]["after"]
    rows = []
    # A type of which no episode was played before or after stands in one of the two alone.
    for kind in sorted(before.keys() | after.keys()):
        share_before = _format_share(*before.get(kind, (0, 0)))
        share_after = _format_share(*after.get(kind, (0, 0)))
        rows.append([kind, share_before, share_after])
    return _render_table("By task type", ["task type", "before", "after"], rows)


def _render_components(summary: dict[str, Any]) -> str:
    before = summary["reward_components"]["before"]
    after = summary["reward_components"]["after"]
    rows = [
        [name, f"{before.get(name, 0.0):.3f}", f"{after.get(name, 0.0):.3f}"]
        for name in sorted(before.keys() | after.keys())
    ]
    return _render_table(
        "Reward components, mean per episode", ["component", "before", "after"], rows
    )


def _render_ledger(summary: dict[str, Any]) -> str:
    rows = [list(item) for item in summary["ledger"].items()]
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
