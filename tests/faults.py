"""A process that dies between two lines: forked from a test, traced, ended where the test says.

The forking process must not use torch's or gRPC's threads before: a fork copies only the thread
that calls it.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

KILLED = 9
"""Exit code of a process that was ended between two lines."""

Line = tuple[str, int]


def run_forked(function: Callable[[], None]) -> int:
    """Exit code of a child process that calls `function`: 0 if it returned, 1 if it raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:  # noqa: BLE001  a forked test must not go on as a second pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trace_lines(files: Collection[str], on_line: Callable[[Line], None]) -> None:
    """Call `on_line` before each line of these files, in this thread and in new ones."""

    def in_frame(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            on_line((frame.f_code.co_filename, frame.f_lineno))
        return in_frame

    def at_call(frame: FrameType, _event: str, _: Any) -> Any:
        return in_frame if frame.f_code.co_filename in files else None

    threading.settrace(at_call)
    sys.settrace(at_call)


def die() -> None:
    """As SIGKILL would: nothing is flushed, closed or undone."""
    os._exit(KILLED)
