"""`sdar compare`: variants of a run over seeds, several at a time, and a table of the results.

A run is a process of its own (`sdar.cli.trial`), so a run that fails stops no other.
Finished ones are kept and never run again. Success is pooled over seeds, with an interval; seeds
are shown one by one beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import typer
import yaml
from pydantic import Field, ValidationError, model_validator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from sdar.cli.processes import end_with_parent
from sdar.config import RunConfig, RunName, Section, load_config, save_config
from sdar.contracts.errors import ConfigurationError, ConflictError
from sdar.process.settings import apply_environment, thread_environment
from services.gateway.evaluation import compute_wilson_interval

_LONGEST_LINE_BYTES = 1 << 20
_STOP_TIMEOUT_S = 15.0


class Variant(Section):
    name: RunName
    """Names the row of the table and the directories of its runs."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the run configuration and their values."""


class Comparison(Section):
    """An experiment: one run configuration, varied."""

    name: RunName
    """Names the directory of all its runs."""
    base: Path
    """Run configuration that every variant begins from; relative to this file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys that all variants have in common."""
    seeds: list[int] = Field(min_length=1)
    """Every variant is run once with each."""
    variants: list[Variant] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_names(self) -> Comparison:
        # Together they name the directories of the runs.
        names = [variant.name for variant in self.variants]
        has_name_twice = len(set(names)) < len(names)
        has_seed_twice = len(set(self.seeds)) < len(self.seeds)
        if has_name_twice or has_seed_twice:
            raise ValueError(
                f"variants {names} and seeds {self.seeds} must each be different from one another."
            )
        return self


@dataclass
class Trial:
    """One variant under one seed. Ends with a summary or with the reason why there is none."""

    variant: str
    seed: int
    config: RunConfig
    directory: Path
    summary: dict[str, Any] | None = None
    failure: str = ""

    @property
    def name(self) -> str:
        return self.directory.name


class View(Protocol):
    """Where progress is shown."""

    def begin(self, trial: Trial) -> None: ...

    def advance(self, trial: Trial, num_updates: int) -> None: ...

    def end(self, trial: Trial) -> None: ...


def run_comparison(spec_path: Path, runs_dir: Path, *, jobs: int, is_json: bool) -> None:
    """Run what is missing of an experiment, `jobs` runs at a time, then write and print its table.

    Raises:
        ConfigurationError: the experiment or one of its variants is not valid; nothing has been run
            then.
        ConflictError: a finished run in its directory was made with another configuration.
        typer.Exit: with code 1 if a run failed.
    """
    comparison = load_comparison(spec_path)
    trials = plan_trials(comparison, spec_path, runs_dir)
    missing = [trial for trial in trials if trial.summary is None]

    apply_environment(thread_environment(1))  # inherited by the runs: one core each
    with _build_view(comparison, missing, is_json) as view:
        asyncio.run(_run_all(missing, jobs, view))

    table = format_table(comparison, trials)
    path = runs_dir / comparison.name / "table.md"
    path.write_text(table, encoding="utf-8")
    if is_json:
        rows = [row.to_json() for row in _rows(comparison, trials)]
        _print_json("table", path=str(path), rows=rows)
    else:
        print(f"{table}\nWritten to {path}.")

    if any(trial.failure for trial in trials):
        raise typer.Exit(1)


def load_comparison(path: Path) -> Comparison:
    """Read an experiment. Raises ConfigurationError naming what is wrong where."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        comparison = Comparison.model_validate(raw)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot read the experiment {path}: {error.strerror}. Check the path."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}. Fix it there.") from error
    except ValidationError as error:
        raise ConfigurationError(
            f"{path}: {_describe_problems(error)}. An experiment has name, base, seeds, variants "
            "(name, set) and perhaps set."
        ) from error

    return comparison.model_copy(update={"base": path.resolve().parent / comparison.base})


def _describe_problems(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        problems.append(f"{key or 'experiment'}: {problem['msg']}")
    return "; ".join(problems)


def plan_trials(comparison: Comparison, spec_path: Path, runs_dir: Path) -> list[Trial]:
    """Every run of the experiment, with the summaries of those that are finished already. Raises as
    `run_comparison`.
    """
    trials = []
    for variant in comparison.variants:
        for seed in comparison.seeds:
            name = f"{variant.name}-seed{seed}"
            # A variant's own values win over those that all have in common.
            overrides = {**comparison.set, **variant.set, "seed": seed, "name": name}
            try:
                config = load_config(comparison.base, overrides)
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"{spec_path}, variant {variant.name}: {error.message}"
                ) from error

            trial = Trial(variant.name, seed, config, runs_dir / comparison.name / name)
            trial.summary = _read_summary(trial)
            trials.append(trial)
    return trials


def _read_summary(trial: Trial) -> dict[str, Any] | None:
    path = trial.directory / "summary.json"
    if not path.exists():
        return None
    if load_config(trial.directory / "config.yaml") != trial.config:
        raise ConflictError(
            f"{trial.directory} holds a finished run with another configuration. Remove that "
            "directory to run it again, or "
            "give the experiment another name."
        )
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


# ---- running


async def _run_all(trials: Sequence[Trial], jobs: int, view: View) -> None:
    places = asyncio.Semaphore(jobs)

    async def run(trial: Trial) -> None:
        async with places:
            view.begin(trial)
            await _run_trial(trial, view)
            view.end(trial)

    async with asyncio.TaskGroup() as group:
        for trial in trials:
            group.create_task(run(trial))


async def _run_trial(trial: Trial, view: View) -> None:
    """Run one trial in a process; afterwards the trial holds its summary or its failure."""
    trial.directory.mkdir(parents=True, exist_ok=True)
    config_path = trial.directory / "config.yaml"
    log_path = trial.directory / "log.txt"
    save_config(trial.config, config_path)

    with log_path.open("wb") as log_file:
        process = await _start_process(trial, config_path, log_file)
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                # Anything else was printed by a library.
                if line.startswith(b"{"):
                    _take_in(trial, json.loads(line), view)
            code = await process.wait()
        finally:
            await _stop(process)

    # A process that was killed could report neither.
    if trial.summary is None and not trial.failure:
        trial.failure = f"ended with code {code}; its last words are in {log_path}"


async def _start_process(
    trial: Trial, config_path: Path, log_file: BinaryIO
) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "sdar.cli.trial", str(config_path), str(trial.directory))
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=log_file,
        # A summary is one line, far longer than asyncio reads unless it is asked to.
        limit=_LONGEST_LINE_BYTES,
        start_new_session=True,  # Ctrl-C is this process's; it ends them
        preexec_fn=end_with_parent,
    )


def _take_in(trial: Trial, message: dict[str, Any], view: View) -> None:
    if message["event"] == "progress":
        view.advance(trial, message["num_updates"])
    elif message["event"] == "error":
        trial.failure = message["message"]
    elif message["event"] == "finished":
        trial.summary = message["summary"]


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End a process that is still there: first asked, then killed."""
    if process.returncode is not None:
        return
    # The run may be writing its metrics.
    process.terminate()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
    if process.returncode is None:
        process.kill()
        await process.wait()


# ---- showing


@contextlib.contextmanager
def _build_view(comparison: Comparison, missing: Sequence[Trial], is_json: bool) -> Any:
    if is_json:
        yield _JsonView()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _BarView(progress, comparison.name, len(missing))


@dataclass
class _BarView:
    """A bar for the experiment and one for each run that is going on."""

    progress: Progress
    name: str
    num_trials: int
    bars: dict[str, TaskID] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = self.progress.add_task(self.name, total=self.num_trials)

    def begin(self, trial: Trial) -> None:
        self.bars[trial.name] = self.progress.add_task(
            trial.name, total=trial.config.training.num_updates
        )

    def advance(self, trial: Trial, num_updates: int) -> None:
        self.progress.update(self.bars[trial.name], completed=num_updates)

    def end(self, trial: Trial) -> None:
        self.progress.remove_task(self.bars.pop(trial.name))
        self.progress.advance(self.total)
        if trial.summary is None:
            end = f"failed: {trial.failure}"
        else:
            before = trial.summary["success_before"]
            after = trial.summary["success_after"]
            end = f"success {before:.3f} -> {after:.3f}"
        self.progress.console.print(f"{trial.name}: {end}", markup=False, highlight=False)


class _JsonView:
    """One object a line for each begin and end."""

    def begin(self, trial: Trial) -> None:
        _print_json("begin", run=trial.name)

    def advance(self, trial: Trial, num_updates: int) -> None:
        """Shows nothing: begins and ends are enough for a program."""

    def end(self, trial: Trial) -> None:
        _print_json("end", run=trial.name, failure=trial.failure, summary=trial.summary)


def _print_json(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


# ---- the table


@dataclass(frozen=True)
class Row:
    """What one variant came to over its seeds. Counts are pooled over the seeds that finished."""

    variant: str
    trials: tuple[Trial, ...]

    @property
    def summaries(self) -> list[dict[str, Any]]:
        return [trial.summary for trial in self.trials if trial.summary is not None]

    def values(self, name: str) -> list[float]:
        return [summary[name] for summary in self.summaries]

    def pool(self, when: str) -> tuple[int, int]:
        """(successes, episodes) of the sampled evaluation, 'before' or 'after'."""
        num_won = 0
        num_played = 0
        for summary in self.summaries:
            for won, played in summary["by_task_type"][when].values():
                num_won += won
                num_played += played
        return num_won, num_played

    def to_json(self) -> dict[str, Any]:
        won, played = self.pool("after")
        success_after = []
        failures = {}
        for trial in self.trials:
            # A place for every seed, so that the list goes with `seeds`.
            success_after.append(trial.summary["success_after"] if trial.summary else None)
            if trial.failure:
                failures[trial.seed] = trial.failure

        return {
            "variant": self.variant,
            "seeds": [trial.seed for trial in self.trials],
            "success_after": success_after,
            "pooled": {
                "num_successes": won,
                "num_episodes": played,
                "interval": compute_wilson_interval(won, played),
            },
            "failures": failures,
        }


_HEADER = (
    "variant",
    "seeds",
    "success after, by seed",
    "pooled [95% Wilson]",
    "mean ± std",
    "greedy after",
    "before",
    "staleness mean, max",
    "updates",
)


def _rows(comparison: Comparison, trials: Sequence[Trial]) -> list[Row]:
    rows = []
    for variant in comparison.variants:
        own = tuple(trial for trial in trials if trial.variant == variant.name)
        rows.append(Row(variant.name, own))
    return rows


def format_table(comparison: Comparison, trials: Sequence[Trial]) -> str:
    """The experiment as a Markdown table, its failures below it."""
    lines = [f"| {' | '.join(_HEADER)} |", f"|{'---|' * len(_HEADER)}"]
    for row in _rows(comparison, trials):
        cells = _format_row(row)
        lines.append(f"| {' | '.join(cells)} |")

    episodes = {trial.summary["num_evaluation_episodes"] for trial in trials if trial.summary}
    if episodes:
        lines += [
            "",
            f"Held-out episodes per seed: {', '.join(map(str, sorted(episodes)))}. Intervals take "
            "episodes as independent.",
        ]

    for trial in trials:
        if trial.failure:
            # Errors may hold line breaks, which would end the paragraph.
            failure = " ".join(trial.failure.split())
            lines.append(f"\nFailed: {trial.name}: {failure}")
    return "\n".join(lines) + "\n"


def _format_row(row: Row) -> list[str]:
    seeds = ", ".join(str(trial.seed) for trial in row.trials)
    by_seed = ", ".join(map(_format_success, row.trials))
    if not row.summaries:
        unknown = ["-"] * (len(_HEADER) - 3)
        return [row.variant, seeds, by_seed, *unknown]

    before = row.pool("before")
    after = row.pool("after")
    low, high = compute_wilson_interval(*after)
    staleness_mean = statistics.mean(row.values("staleness_mean"))
    staleness_max = max(row.values("staleness_max"))
    updates = sorted(set(map(int, row.values("num_updates"))))
    return [
        row.variant,
        seeds,
        by_seed,
        f"{_share(after):.3f} [{low:.3f}, {high:.3f}]",
        _format_spread(row.values("success_after")),
        f"{statistics.mean(row.values('greedy_success_after')):.3f}",
        f"{_share(before):.3f}",
        f"{staleness_mean:.2f}, {staleness_max:.0f}",
        ", ".join(map(str, updates)),
    ]


def _format_success(trial: Trial) -> str:
    if trial.summary is None:
        return "failed"
    return f"{trial.summary['success_after']:.3f}"


def _format_spread(success: Sequence[float]) -> str:
    """Mean and standard deviation over seeds; of one seed, its success alone."""
    if len(success) == 1:
        return f"{success[0]:.3f}"
    return f"{statistics.mean(success):.3f} ± {statistics.stdev(success):.3f}"


def _share(counts: tuple[int, int]) -> float:
    return counts[0] / counts[1] if counts[1] else 0.0
