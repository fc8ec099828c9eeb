"""Owns the scaling file (SDAR_SCALING): what may be scaled, within which bounds. Never decides a
size.

The file is read again at every look, so that a changed bound restarts nothing. One that cannot be
used is told of, and the last good one stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import structlog
import yaml
from pydantic import Field, ValidationError, model_validator

from sdar.config import Section

log = structlog.get_logger()

Role = Literal["rollout", "teacher", "envs", "learner"]
SLEEPING: tuple[Role, ...] = ("rollout", "teacher", "learner")
"""What the idle guard scales to zero, in the order of the data's flow: what may hold a GPU."""


class Workload(Section):
    """One workload of the cluster and its bounds."""

    kind: Literal["Deployment", "StatefulSet"]
    name: str = Field(min_length=1)
    """Name of the object, in the gateway's own namespace."""
    min: int = Field(ge=1, le=1000)
    """Fewest replicas of a run that is awake."""
    max: int = Field(ge=1, le=1000)
    """Most replicas. Equal to min: a fixed size, which only the idle guard touches."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max < self.min:
            raise ValueError(
                f"max {self.max} of {self.name} is below its min {self.min}. Raise the first or "
                "lower the second."
            )
        return self

    def clamp(self, replicas: int) -> int:
        return max(self.min, min(self.max, replicas))


class ScalingFile(Section):
    """What the gateway may scale."""

    mode: Literal["gateway", "keda"] = "gateway"
    """keda: something else sizes rollout, teacher and envs; the gateway has the learner only, for
    the idle guard.
    """
    dry_run: bool = False
    """Say what would be done and why, and do nothing."""
    idle_after_s: float = Field(default=1800.0, ge=0, le=31_536_000)
    """A run that is finished, failed, paused or stuck for so long is put to sleep; 0 for never."""
    workloads: dict[Role, Workload] = Field(default_factory=dict)
    """By service; one that is missing is left alone."""

    @property
    def managed(self) -> dict[Role, Workload]:
        """The workloads whose size is the gateway's to decide."""
        return {
            role: w
            for role, w in self.workloads.items()
            if self.mode == "gateway" or role == "learner"
        }


class ScalingFileReader:
    """The newest usable contents of the file at `path`.

    Attributes:
        file: none until a first good one was read.
        problem: why the newest one cannot be used; empty if it can.
    """

    def __init__(self, path: Path) -> None:
        self.file: ScalingFile | None = None
        self.problem = ""
        self._path = path
        self._text: str | None = None

    def refresh(self) -> bool:
        """Read again; tells whether a new fault was found. Never raises for what the file holds."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self._text = None  # whatever comes next is looked at, also what was there before
            return self._refuse(f"{self._path} cannot be read: {error}.")
        if text == self._text:
            return False
        try:
            self.file = ScalingFile.model_validate(yaml.safe_load(text))
        except Exception as error:  # noqa: BLE001  # PyYAML raises what it likes for a value that its tag does not fit
            self._text = text
            return self._refuse(f"{self._path} is no scaling file: {_describe(error)}")
        if self._text is not None:
            log.info("scaling_file_changed", mode=self.file.mode, dry_run=self.file.dry_run)
        self._text, self.problem = text, ""
        return False

    def _refuse(self, problem: str) -> bool:
        kept = (
            "The last good one stays in force."
            if self.file
            else "Nothing is scaled until it is mended."
        )
        is_new = f"{problem} {kept}" != self.problem
        self.problem = f"{problem} {kept}"
        if is_new:
            log.error("scaling_file_refused", problem=self.problem)
        return is_new


def _describe(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split()) + "."
    faults = [
        f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors()
    ]
    return "; ".join(faults) + "."
