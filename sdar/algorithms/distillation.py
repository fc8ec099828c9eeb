"""The gap between a teacher with privileged context and the student, and the gated term on it.

Everything reads the teacher through `compute_teacher_gap`, which is detached and finite, so no term
can send a gradient to the teacher and none can be poisoned by a log-prob it gave as -inf.

Axes: N sampled tokens. S student (policy) log-prob, T teacher log-prob, D teacher gap.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from sdar.algorithms.reductions import fill_masked


def compute_teacher_gap(
    policy_logprobs: Float[Tensor, " N"],
    teacher_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """D = sg(T - S), without gradient; 0 where `mask` is false.

    On sampled tokens its mean estimates minus the reverse KL of the student to the teacher.
    """
    student = policy_logprobs.detach()
    # The student's own value outside the mask, so that -inf never enters the difference.
    return fill_masked(teacher_logprobs.detach(), mask, student) - student


def compute_live_gap(
    policy_logprobs: Float[Tensor, " N"], teacher_gap: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """The value of D, with the gradient -1 that T - S has through S."""
    return teacher_gap + policy_logprobs.detach() - policy_logprobs


def compute_gated_distillation(
    policy_logprobs: Float[Tensor, " N"],
    teacher_gap: Float[Tensor, " N"],
    gate: Float[Tensor, " N"] | float,
) -> Float[Tensor, " N"]:
    """l = g (T - S), gradient -g through S alone (SDAR, arXiv:2605.15155).

    A constant `gate` gives the published ungated control.
    The gradient always raises the sampled token, also where the teacher disagrees (there the gate
    only attenuates), and is -g / 2 rather than 0 where it has nothing to say (D = 0, g = 0.5).
    """
    return gate * compute_live_gap(policy_logprobs, teacher_gap)
