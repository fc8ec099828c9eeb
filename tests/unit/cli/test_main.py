"""The command itself: what it costs to ask it for help, and what help says."""

import subprocess
import sys
from pathlib import Path

import pytest

# What works rather than explains: each of these takes longer to import than help takes to print.
ROOT = Path(__file__).parents[3]
HEAVY = (
    "asyncio",
    "grpc",
    "httpx",
    "kubernetes",
    "matplotlib",
    "numpy",
    "pydantic",
    "redis",
    "rich",
    "structlog",
    "torch",
    "transformers",
    "yaml",
)
HELP = """
import sys
from sdar.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
print(*(name for name in sys.argv[1].split(",") if name in sys.modules), file=sys.stderr)
"""


def test_help_imports_nothing_that_does_a_verbs_work() -> None:
    command = [sys.executable, "-c", HELP, ",".join(HEAVY)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    assert "Usage:" in done.stdout
    assert done.stderr.split() == []


@pytest.mark.parametrize("group", [[], ["env"], ["dead-letter"], ["model"]])
def test_the_summary_of_every_verb_fits_its_line(
    group: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from sdar.cli.main import main

    with pytest.raises(SystemExit):
        main([*group, "--help"])
    verbs = capsys.readouterr().out.partition("Commands:")[2].splitlines()
    assert verbs
    assert [line for line in verbs if line.endswith("...")] == []
