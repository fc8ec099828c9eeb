"""Schedules: how the teacher's weight changes over the updates.

One module a schedule, named in a method's row.
Lambda of every distillation term is multiplied by the factor; a shaping of the advantages reads it
as `TokenInputs.teacher_weight`.
"""

from __future__ import annotations

from collections.abc import Callable

from sdar.contracts.methods import LossSettings
from sdar.contracts.registry import Registry

Schedule = Callable[[int, LossSettings], float]
"""(optimizer updates done so far, settings) -> a factor in [0, 1]."""

SCHEDULES: Registry[Schedule] = Registry("schedule", __name__)
