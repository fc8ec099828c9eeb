"""An environment that breaks in every way there is: each text is a command.

Worker processes of several suites import it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from sdar.contracts.errors import CapacityError
from sdar.contracts.types import Task
from sdar.environments.base import Environment, Observation, StepResult

ENORMOUS_BYTES = 40_000_000
_both_are_here = threading.Barrier(2)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Misbehaving(Environment):
    """Well-behaved for a text that is no command: the answer is its process's id, the reward 1.

    Options:
        trap: a file; while it is there, this environment's process dies when one is built.
        delay_s: what it takes to build one.
        seed: of its tasks; a text is none.
    """

    name = "misbehaving"
    version = "1"
    splits = ("train",)
    max_turns = 100

    def __init__(self, trap: str = "", delay_s: float = 0.0, seed: int | str = 0) -> None:
        time.sleep(delay_s)
        if trap and Path(trap).exists():
            os._exit(3)
        self.tasks = {
            "train": [
                Task(self.name, "train", f"task {number}", "", "behave .", seed)
                for number in range(50)
            ]
        }

    def reset(self, task_id: str, seed: int) -> Observation:
        self.get_task(task_id)
        match seed:
            case -1:
                raise OSError("no such file")
            case -2:
                return Observation("\ud800")
            case -3:
                time.sleep(3600)
            case -4:
                raise CapacityError("no chair is free")
        return Observation(f"process {os.getpid()}", ("stay",), {"seed": str(seed)})

    def step(self, text: str) -> StepResult:
        self._misbehave(text)
        return self._answer(text)

    def _misbehave(self, text: str) -> None:
        """What goes wrong before there is an answer."""
        match text.split():
            case ["hang"]:
                time.sleep(3600)
            case ["hang", "hard"]:
                # It holds the interpreter's lock: nothing in the process runs any more.
                ctypes.PyDLL(None).pause()
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["die"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["exit"]:
                sys.exit(4)
            case ["raise"]:
                raise ZeroDivisionError("by zero")
            case ["raise", "mute"]:
                raise Mute
            case ["raise", "enormous"]:
                raise ValueError("x" * 1_000_000)
            case ["start", "child"]:
                # It inherits whatever its worker holds open, and outlives it.
                subprocess.Popen(["sleep", "3600"], close_fds=False)
            case ["full"]:
                raise CapacityError("no chair is free")
            case ["unknown"]:
                raise self.unknown_task("chair")
            case ["print"]:
                print("a print is no answer")

    def _answer(self, text: str) -> StepResult:
        here = Observation(str(os.getpid()), ("stay",))
        match text.split():
            case ["reward", reward]:
                return StepResult(here, float(reward))
            case ["component", value]:
                return StepResult(here, reward_components={"score": float(value)})
            case ["text", "reward"]:
                return StepResult(here, "1.0")
            case ["surrogate"]:
                return StepResult(Observation("\udfff"))
            case ["surrogate", "info"]:
                return StepResult(here, info={"key": "\ud800"})
            case ["number", "info"]:
                return StepResult(here, info={"key": 3})
            case ["one", "action"]:
                return StepResult(Observation("", "stay"))
            case ["both", "ends"]:
                return StepResult(here, terminated=True, truncated=True)
            case ["maybe"]:
                return StepResult(here, is_success=None)
            case ["bytes"]:
                return StepResult(Observation(b"bytes"))
            case ["nothing"]:
                return None
            case ["enormous"]:
                return StepResult(Observation("x" * ENORMOUS_BYTES))
            case ["big"]:
                return StepResult(Observation("é" * 1_000_000))
            case ["echo", *_]:
                return StepResult(Observation(text))
        return StepResult(here, 1.0)


class Waiting(Misbehaving):
    """Blocks outside the interpreter: `meet` returns only if two sessions are in it at once."""

    name, is_blocking = "waiting", True

    def step(self, text: str) -> StepResult:
        if text == "meet":
            _both_are_here.wait(timeout=10)
        return super().step(text)
