"""One run of a comparison: a process that plays it in itself and reports to its parent.

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
    """Run a configuration and leave metrics.jsonl and, last, summary.json in `run_dir`, if it
    finishes.

    Tells a parent process about it on stdout, one JSON object a line: updates done, an error, the
    summary.
    """
    configure_logging("in-process", run_dir.name, "warning", "text")
    began = time.monotonic()
    try:
        config = load_config(config_path)
        with RunDirectory(run_dir) as directory:
            directory.metrics.unlink(missing_ok=True)
            outcome = run_in_process(
                config, lambda num_updates: _tell("progress", num_updates=num_updates)
            )
            MetricsLog(directory.metrics).extend(outcome.records)
            summary = build_summary(
                config, outcome.status, outcome.records, time.monotonic() - began
            )
            directory.write_json(directory.summary, summary)
    except SdarError as error:
        _tell("error", message=error.message)
        return 1
    _tell("finished", summary=summary)
    return 0


def _tell(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
