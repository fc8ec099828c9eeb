"""The scaling file (SDAR_SCALING): what may be scaled, within which bounds. Never decides a size.

The file is read again at every look, so that a changed bound restarts nothing. One that cannot be
used raises an alarm, and the last good one stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import structlog
import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from sdar.config import Section
from sdar.contracts.roles import ROLES, SCALABLE, Role, Signal

log = structlog.get_logger()


def _check_scalable(role: Role) -> Role:
    if role not in SCALABLE:
        raise ValueError(f"{role} is not scaled. Name some of {', '.join(SCALABLE)}.")
    return role


ScalableRole = Annotated[Role, AfterValidator(_check_scalable)]


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
    workloads: dict[ScalableRole, Workload] = Field(default_factory=dict)
    """By service; one that is missing is left alone."""

    @property
    def managed(self) -> dict[Role, Workload]:
        """The workloads whose size is the gateway's to decide."""
        if self.mode == "gateway":
            return self.workloads
        # What follows a signal is KEDA's; what has none is only put to sleep.
        fixed = (role for role in self.workloads if ROLES[role].signal is Signal.NONE)
        return {role: self.workloads[role] for role in fixed}


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
        """Read again; returns whether a new fault was found. Never raises for what it holds."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self._text = None  # whatever comes next is looked at, also what was there before
            return self._refuse(f"{self._path} cannot be read: {error}.")
        # As it was, good or bad: a fault is reported once.
        if text == self._text:
            return False
        try:
            self.file = ScalingFile.model_validate(yaml.safe_load(text))
        except Exception as error:  # noqa: BLE001  # PyYAML raises anything for a bad tag
            self._text = text
            return self._refuse(f"{self._path} is no scaling file: {_describe(error)}")
        if self._text is not None:
            log.info("scaling_file_changed", mode=self.file.mode, dry_run=self.file.dry_run)
        self._text = text
        self.problem = ""
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
    faults = []
    for fault in error.errors():
        place = ".".join(map(str, fault["loc"])) or "file"
        faults.append(f"{place}: {fault['msg']}")
    return "; ".join(faults) + "."
