"""Runs one run of a comparison, whole in this process, and reports to the parent process.

python -m sdar.cli.trial CONFIG RUN_DIRECTORY
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from sdar.cli.metrics_log import MetricsLog
from sdar.cli.report import build_summary
from sdar.cli.run_directory import RunDirectory
from sdar.config import load_config
from sdar.contracts.errors import SdarError
from sdar.in_process.run import run_in_process
from sdar.process.telemetry import configure_logging


def main(config_path: Path, run_dir: Path) -> int:
    """Run a configuration, and leave metrics.jsonl and summary.json in `run_dir` if it finishes.

    The summary is written last: its existence says that the run is finished. Updates done, an error
    or the summary are reported on stdout, one JSON object a line.
    """
    configure_logging("in-process", run_dir.name, "warning", "text")
    began = time.monotonic()
    try:
        config = load_config(config_path)
        with RunDirectory(run_dir) as directory:
            # Of an attempt that did not finish: such a run is not resumed but played again.
            directory.metrics.unlink(missing_ok=True)
            outcome = run_in_process(config, _report_progress)
            wall_s = time.monotonic() - began

            MetricsLog(directory.metrics).extend(outcome.records)
            summary = build_summary(config, outcome.status, outcome.records, wall_s)
            directory.write_json(directory.summary, summary)
    except SdarError as error:
        _report("error", message=error.message)
        return 1
    _report("finished", summary=summary)
    return 0


def _report_progress(num_updates: int) -> None:
    _report("progress", num_updates=num_updates)


def _report(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
