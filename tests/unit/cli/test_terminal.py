"""What others wrote reaches a person's terminal as text: no control characters, no markup."""

import io

import pytest
from rich.console import Console

from sdar.cli import main as cli
from sdar.cli.conformance.check import Check, Outcome, Verdict
from sdar.cli.conformance.report import print_report
from sdar.cli.conformance.runner import Report
from sdar.cli.live import LineView
from sdar.config import load_config
from sdar.contracts.errors import UnavailableError
from sdar.wire.tokens import check_token
from tests.support import EXAMPLES

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e[bold]markup[/bold]"


def is_harmless(text: str) -> bool:
    return "owned" in text and not set(text) & set("\x1b\x07\u202e")


def test_the_report_of_a_check_shows_a_servers_words_as_text():
    async def run(bench: object) -> None:
        raise AssertionError("never run")

    failed = Outcome(
        Check("check.id", "A claim", "A remedy", run), Verdict.FAIL, 0.1, HOSTILE, HOSTILE
    )
    unknown = Outcome(
        Check("other.id", "A claim", "A remedy", run), Verdict.NOT_RUN, 0.1, "", HOSTILE
    )
    console = Console(width=200, file=io.StringIO())
    print_report(Report("127.0.0.1:1", HOSTILE, HOSTILE, True, (failed, unknown), 0.2), console)
    shown = console.file.getvalue()
    assert is_harmless(shown)
    assert shown.count("[bold]") == 5


def test_an_error_shows_a_servers_words_as_text(capsys):
    with pytest.raises(SystemExit):
        cli.fail(UnavailableError(HOSTILE), [])
    assert is_harmless(capsys.readouterr().err)


def test_the_lines_of_a_run_show_others_words_as_text(capsys):
    LineView(load_config(EXAMPLES / "household.yaml")).say(HOSTILE)
    assert is_harmless(capsys.readouterr().out)


def test_sdar_token_prints_a_token_that_is_accepted_and_another_each_time(capsys):
    printed = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            cli.main(["token"])
        assert ended.value.code == 0
        printed.append(capsys.readouterr().out.strip())
    assert printed[0] != printed[1]
    assert [check_token(token, "stdout") for token in printed] == printed
