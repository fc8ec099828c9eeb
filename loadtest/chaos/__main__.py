"""The command `python -m loadtest.chaos`: a run under faults, its checks and its report.

Its exit code is 0 if every promise was kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from loadtest.chaos import checks
from loadtest.chaos.checks import Check
from loadtest.chaos.faults import build_schedule
from loadtest.chaos.report import build_report, format_table, write_json, write_markdown
from loadtest.chaos.run import ChaosRun, Evidence
from loadtest.page import ROOT
from sdar.bus.protocol import SUSPECT_FACTOR
from sdar.config import RunConfig, load_config
from sdar.contracts.errors import SdarError
from sdar.contracts.types import GroupOutcome
from sdar.process.telemetry import configure_logging
from services.learner.checkpoint import read_trained_groups
from services.rollout.worker import RolloutLimits

DEFAULT_MINUTES = 10.0
DEFAULT_SEED = 27
_UPDATES_PER_MINUTE = 40
"""What two cores manage between the faults, about."""
NUM_ROLLOUTS = 2
_PAGE = ROOT / "docs" / "chaos.md"
SETTINGS = {
    "name": "chaos",
    "training.groups_per_update": 4,
    "training.group_size": 8,
    "training.checkpoint_every": 3,
    "evaluation.num_tasks": 24,
    "rollout.num_workers": NUM_ROLLOUTS,
    "rollout.max_concurrent_episodes": 32,
    # Its pages are touched in the first seconds, so what grows later is a leak.
    "rollout.kv_cache_gib": 0.05,
    # A group may be hit again and again; none is to fail for it.
    "rollout.max_group_attempts": 20,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    # Errors alone: that Redis is away is no news to the observer.
    configure_logging("chaos", "observer", "error", "text")
    config = _configure(options.minutes)
    lease_s = RolloutLimits(max_concurrent_episodes=1).lease_s * SUSPECT_FACTOR
    schedule = build_schedule(options.seed, options.minutes, NUM_ROLLOUTS, lease_s)

    root = Path(options.out or tempfile.mkdtemp(prefix="sdar-chaos-"))
    directory = root / config.name
    if directory.exists():
        print(
            f"error: {directory} holds an earlier run. Remove it or choose another --out.",
            file=sys.stderr,
        )
        return 2
    root.mkdir(parents=True, exist_ok=True)

    try:
        evidence = ChaosRun(config, directory, schedule, _build_clocked_print()).run()
    except SdarError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    return _report(evidence, options, root)


def _build_clocked_print() -> Callable[[str], None]:
    """A print that puts the seconds since now before each line."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    return say


def _report(evidence: Evidence, options: argparse.Namespace, root: Path) -> int:
    """Judge, write and print; returns the exit code."""
    command = f"python -m loadtest.chaos --seed {options.seed} --minutes {options.minutes:g}"
    report = build_report(
        evidence, judge(evidence), seed=options.seed, minutes=options.minutes, command=command
    )
    write_json(report, evidence, root / "chaos.json")
    write_markdown(report, root / "chaos.md")
    print(f"\n{format_table(report)}")
    if options.page:
        shutil.copyfile(root / "chaos.md", _PAGE)

    if report.is_sound and not options.out:
        shutil.rmtree(root)
    else:
        print(f"\nLogs and all figures: {root}")
    return 0 if report.is_sound else 1


def judge(evidence: Evidence) -> list[Check]:
    """Every promise of the run."""
    training = evidence.config.training
    injuries = evidence.injuries
    phase = evidence.status.get("phase", "unknown")
    num_updates = evidence.status.get("num_updates", 0)
    reclaimed = [event.fields["entry_id"] for event in evidence.of("group_reclaimed")]

    return [
        checks.check_end(phase, num_updates, training.num_updates),
        checks.check_faults(injuries, evidence.num_planned, NUM_ROLLOUTS),
        checks.check_closed(evidence.account, evidence.closed),
        checks.check_trained(
            read_trained_groups(evidence.directory / "checkpoints"),
            evidence.closed[GroupOutcome.TRAINED],
            training.groups_per_update,
            training.num_updates,
        ),
        checks.check_samples(evidence.samples, evidence.num_samples_missed),
        checks.check_recovered(injuries),
        checks.check_rollout_recovery(injuries),
        checks.check_regenerated(reclaimed, injuries),
        checks.check_nothing_left(
            evidence.num_sessions_left,
            evidence.orphans,
            find_half_written(evidence.directory),
            evidence.not_drained,
        ),
        checks.check_memory(evidence.memory),
        checks.check_redis_memory(evidence.samples),
    ]


def find_half_written(directory: Path) -> list[str]:
    """Checkpoints under their temporary name, and versions of weights without a manifest."""
    versions = directory.glob("weights/*/v*")
    found = list(directory.glob("checkpoints/*.partial"))
    found += [path for path in versions if not (path / "manifest.json").exists()]
    return [str(path.relative_to(directory)) for path in found]


def _configure(minutes: float) -> RunConfig:
    num_updates = max(1, round(_UPDATES_PER_MINUTE * minutes))
    return load_config(
        ROOT / "examples" / "household.yaml", SETTINGS | {"training.num_updates": num_updates}
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.chaos", description="A real run under random faults, checked."
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        help="of the faults: the same seed, the same schedule",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        help="of faults; the start and the end come on top",
    )
    parser.add_argument(
        "--out",
        help="where the run, its logs and the figures stay (default: kept only on a failure)",
    )
    parser.add_argument("--page", action="store_true", help="write docs/chaos.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
