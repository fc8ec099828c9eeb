"""Owns learning from a teacher that is the same policy with privileged context: gap, gates and
per-token distillation terms.

Everything reads the teacher through `compute_teacher_gap`, which is detached and finite, so no term
can send a gradient to the teacher and none can be poisoned by a log-prob it gave as -inf. Never
normalises and never weighs for staleness: `methods` does.

Axes: N sampled tokens. S student (policy) log-prob, T teacher log-prob, D teacher gap.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdar.algorithms.reductions import fill_masked

GateKind = Literal["gap", "entropy", "soft_or"]


def compute_teacher_gap(
    policy_logprobs: Float[Tensor, " N"],
    teacher_logprobs: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """D = sg(T - S), minus the one-sample estimate of the reverse KL; 0 where `mask` is false. No
    gradient.
    """
    student = policy_logprobs.detach()
    return fill_masked(teacher_logprobs.detach(), mask, student) - student


def compute_gate(
    kind: GateKind, teacher_gap: Float[Tensor, " N"], entropy: Float[Tensor, " N"], sharpness: float
) -> Float[Tensor, " N"]:
    """How far each token's distillation is let through, in (0, 1), without gradient (SDAR,
    arXiv:2605.15155).

    gap: sigmoid(beta D): full where the teacher finds the sampled token likelier, attenuated where
    less likely. entropy: sigmoid(beta h): h is never negative, so it never falls under 0.5.
    soft_or: sigmoid(beta [1 - (1 - h)(1 - D)]), as published: h is in nats and may pass 1, where a
    negative D opens the gate.

    At sharpness 0 every gate is 0.5: not "no gate", but half of it, with the teacher out of the
    gradient.
    """
    h = entropy.detach()
    if kind == "gap":
        score = teacher_gap
    elif kind == "entropy":
        score = h
    else:
        score = 1 - (1 - h) * (1 - teacher_gap)
    return torch.sigmoid(sharpness * score.detach())


def compute_gated_distillation(
    policy_logprobs: Float[Tensor, " N"],
    teacher_gap: Float[Tensor, " N"],
    gate: Float[Tensor, " N"] | float,
) -> Float[Tensor, " N"]:
    """l = g (T - S), gradient -g through S alone (SDAR's term). A constant `gate` gives the
    published ungated control.

    The gradient always raises the sampled token, also where the teacher disagrees (there the gate
    only attenuates), and is -g / 2 rather than 0 where it has nothing to say (D = 0, g = 0.5).
    """
    live_gap = teacher_gap + policy_logprobs.detach() - policy_logprobs
    return gate * live_gap


def compute_reverse_kl_distillation(
    policy_logprobs: Float[Tensor, " N"], teacher_gap: Float[Tensor, " N"], *, gap_bound: float
) -> Float[Tensor, " N"]:
    """l = -sg(clip(D, +-gap_bound)) S: on-policy self-distillation (OPSD) proper, the gradient of
    the reverse KL.

    The gap acts as an advantage: a token that the teacher finds less likely is lowered, which the
    gated term never does.
    """
    return -teacher_gap.clamp(-gap_bound, gap_bound) * policy_logprobs


def compute_skill_sd(
    policy_logprobs: Float[Tensor, " N"],
    teacher_gap: Float[Tensor, " N"],
    behavior_logprobs: Float[Tensor, " N"],
    *,
    gap_bound: float,
    log_ratio_bound: float,
) -> Float[Tensor, " N"]:
    """rho k3 with l = S - T, k3 = exp(min(-l, gap_bound)) - 1 + l, rho = exp(min(S - S_old,
    log_ratio_bound)) (Skill-SD).

    Gradient through rho and k3. It carries its own importance ratio, so no off-policy weight
    belongs on it.
    """
    live_gap = teacher_gap + policy_logprobs.detach() - policy_logprobs
    k3 = live_gap.clamp(max=gap_bound).exp() - 1 - live_gap
    rho = (policy_logprobs - behavior_logprobs).clamp(max=log_ratio_bound).exp()
    return rho * k3


def compute_rlsd_mixing(initial: float, decay_updates: int, update_index: int) -> float:
    """Share of the teacher-shaped part of the advantage: `initial` at update 0, falling linearly to
    0 at `decay_updates`.
    """
    return initial * max(0.0, 1.0 - update_index / decay_updates)


def compute_rlsd_advantages(
    advantages: Float[Tensor, " N"], teacher_gap: Float[Tensor, " N"], *, mixing: float, clip: float
) -> Float[Tensor, " N"]:
    """A [(1 - mixing) + mixing clip(exp(sign(A) D), 1 - clip, 1 + clip)] (RLSD): the teacher shifts
    credit between tokens.

    Keeps every token's sign, and everything where A = 0. No gradient.
    """
    # Clipping the exponent instead of the exponential is the same and cannot overflow.
    exponent = (advantages.sign() * teacher_gap).clamp(math.log(1 - clip), math.log(1 + clip))
    return advantages * ((1 - mixing) + mixing * exponent.exp())
