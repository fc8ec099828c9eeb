"""The schedule of RLSD: the teacher fades out linearly."""

from __future__ import annotations

from sdar.algorithms.schedules import SCHEDULES
from sdar.contracts.methods import LossSettings


@SCHEDULES.register("rlsd_decay")
def rlsd_decay(update_index: int, settings: LossSettings) -> float:
    """1 at update 0, falling linearly to 0 at `rlsd.decay_updates`, where it stays."""
    return max(0.0, 1.0 - update_index / settings.rlsd.decay_updates)
