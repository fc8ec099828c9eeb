"""The constant schedule: the teacher weighs the same at every update."""

from __future__ import annotations

from sdar.algorithms.schedules import SCHEDULES
from sdar.contracts.methods import LossSettings


@SCHEDULES.register("constant")
def constant(update_index: int, settings: LossSettings) -> float:
    """Always 1."""
    return 1.0
