"""Owns the methods: GRPO, SDAR and their relatives as lists of terms, and the one function that
evaluates such a list.

A method is data. Each term is a function from token inputs to a per-token loss; `compute_loss` sums
every term over the tokens and divides by the *batch's* token count, so that micro-batches and ranks
simply add up. There are no flags for terms: a term with coefficient 0 is not evaluated.

Axes: N sampled tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdar.algorithms.advantages import AdvantageLevel
from sdar.algorithms.batching import MicroBatch
from sdar.algorithms.distillation import (
    GateKind,
    compute_gate,
    compute_gated_distillation,
    compute_reverse_kl_distillation,
    compute_rlsd_advantages,
    compute_rlsd_mixing,
    compute_skill_sd,
    compute_teacher_gap,
)
from sdar.algorithms.measurements import DENOMINATORS
from sdar.algorithms.off_policy import Correction, OffPolicyWeights, compute_off_policy_weights
from sdar.algorithms.policy_loss import compute_policy_loss
from sdar.algorithms.reductions import masked_mean, masked_sum
from sdar.algorithms.reference_kl import compute_entropy_loss, compute_k3_kl
from sdar.contracts.errors import ConfigurationError, ContractError


@dataclass(frozen=True, slots=True)
class LossSettings:
    """Every number the losses use. The first block carries the names of the run configuration's
    `method` section.
    """

    distillation_weight: float = 0.01
    """Lambda: weight of the distillation term."""
    gate: GateKind = "gap"
    """What opens the gate of the sdar term."""
    gate_sharpness: float = 5.0
    """Beta: slope of the gate."""
    kl_coefficient: float = 0.01
    """Weight of the k3 KL to the frozen reference; 0 needs no reference."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    clip_low: float = 0.2
    """Ratios are clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """Ratios are clipped above 1 + clip_high."""
    dual_clip: float = 3.0
    """Bound on the loss of a token with negative advantage, as a multiple of it."""
    advantage_level: AdvantageLevel = "trajectory"
    """Rows that a group's mean and deviation are taken over; read where advantages are computed,
    not by the losses.
    """
    off_policy: Correction = "decoupled"
    """Correction for tokens that an older policy sampled."""
    off_policy_cap: float = 5.0
    """Upper bound of off-policy weights, or upper edge of the icepop mask."""
    weigh_distillation: bool = True
    """Apply the off-policy weight to the distillation term; False is the published form."""
    rlsd_mixing: float = 0.5
    """rlsd: share of the teacher-shaped advantage at update 0."""
    rlsd_decay_updates: int = 100
    """rlsd: updates until that share is 0."""
    rlsd_clip: float = 0.2
    """rlsd: clip of the teacher's multiplier around 1."""

    constant_gate: float = 1.0
    """constant_gate: the gate of every token."""
    icepop_low: float = 0.5
    """icepop: lower edge of the mask."""
    log_ratio_bound: float = 20.0
    """Clamp of log ratios before any exponential: wide enough never to matter, narrow enough never
    to overflow.
    """
    k3_bound: float = 10.0
    """Largest k3 KL of one token."""
    opsd_gap_bound: float = 10.0
    """opsd: clamp of the teacher gap where it acts as an advantage."""
    skill_sd_gap_bound: float = 20.0
    """skill_sd: bound on the exponent of its k3."""
    skill_sd_log_ratio_bound: float = 10.0
    """skill_sd: bound on the log of its importance ratio."""
    gate_open_threshold: float = 0.5
    """A gate above this counts as open in the metrics: the value it has at gap 0."""

    def __post_init__(self) -> None:
        bounds = {
            "dual_clip > 1": self.dual_clip > 1,
            "0 < clip_low < 1": 0 < self.clip_low < 1,
            "clip_high > 0": self.clip_high > 0,
            "0 < rlsd_clip < 1": 0 < self.rlsd_clip < 1,
            "rlsd_decay_updates >= 1": self.rlsd_decay_updates >= 1,
            "off_policy_cap >= 1": self.off_policy_cap >= 1,
            "icepop_low <= 1": self.icepop_low <= 1,
        }
        broken = [rule for rule, holds in bounds.items() if not holds]
        if broken:
            raise ConfigurationError(
                f"Loss settings break {', '.join(broken)}: got {self}. Fix the run's method "
                "section."
            )


@dataclass(frozen=True, slots=True, eq=False)
class TokenInputs:
    """What terms read, one value per sampled token. Gradients: `policy_logprobs`, `entropy` and
    `off_policy.ratio` only.
    """

    policy_logprobs: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    behavior_logprobs: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    ref_logprobs: Float[Tensor, " N"] | None
    teacher_gap: Float[Tensor, " N"]
    """0 where `is_scored` is false."""
    is_scored: Bool[Tensor, " N"]
    """Tokens with a finite teacher log-prob; nowhere true for methods without a teacher."""
    off_policy: OffPolicyWeights
    update_index: int


Metrics = dict[str, Tensor]
TermFunction = Callable[[TokenInputs, LossSettings], tuple[Float[Tensor, " N"], Metrics]]


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a loss. `compute` returns the loss of every token (finite everywhere) and
    per-token measurements.
    """

    name: str
    compute: TermFunction
    coefficient: Callable[[LossSettings], float]
    is_distillation: bool = False
    """Counts scored tokens only, and learns from the teacher even where no advantage is left."""


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    terms: tuple[Term, ...]
    needs_teacher: bool
    """Trajectories must carry teacher scores."""
    student_sees_skills: bool = False
    """The rollout puts skills into the student's own prompt."""

    @property
    def learns_without_advantage(self) -> bool:
        """Whether a group whose episodes all scored the same still teaches something; if not it may
        be skipped.
        """
        return any(term.is_distillation for term in self.terms)

    def needs_reference(self, settings: LossSettings) -> bool:
        """Whether `compute_loss` wants `ref_logprobs`."""
        return any(term is KL_TERM for term in self.terms) and settings.kl_coefficient > 0


def _policy_term(inputs: TokenInputs, settings: LossSettings) -> tuple[Tensor, Metrics]:
    return _clipped_policy_loss(inputs, inputs.advantages, settings)


def _rlsd_policy_term(inputs: TokenInputs, settings: LossSettings) -> tuple[Tensor, Metrics]:
    mixing = compute_rlsd_mixing(
        settings.rlsd_mixing, settings.rlsd_decay_updates, inputs.update_index
    )
    shaped = compute_rlsd_advantages(
        inputs.advantages, inputs.teacher_gap, mixing=mixing, clip=settings.rlsd_clip
    )
    return _clipped_policy_loss(inputs, shaped, settings)


def _clipped_policy_loss(
    inputs: TokenInputs, advantages: Tensor, settings: LossSettings
) -> tuple[Tensor, Metrics]:
    result = compute_policy_loss(
        inputs.off_policy.ratio,
        advantages,
        inputs.off_policy.policy_weight,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    return result.loss, {
        "clip_fraction": result.is_clipped,
        "dual_clip_fraction": result.is_dual_clipped,
    }


def _kl_term(inputs: TokenInputs, settings: LossSettings) -> tuple[Tensor, Metrics]:
    if inputs.ref_logprobs is None:
        raise ContractError(
            f"kl_coefficient is {settings.kl_coefficient} but no ref_logprobs were given. Score "
            "the batch with the reference."
        )
    k3_kl = compute_k3_kl(
        inputs.policy_logprobs,
        inputs.ref_logprobs,
        log_ratio_bound=settings.log_ratio_bound,
        bound=settings.k3_bound,
    )
    return k3_kl, {"k3_kl": k3_kl}


def _entropy_term(inputs: TokenInputs, settings: LossSettings) -> tuple[Tensor, Metrics]:
    return compute_entropy_loss(inputs.entropy), {}


def _sdar_term(inputs: TokenInputs, settings: LossSettings) -> tuple[Tensor, Metrics]:
    gate = compute_gate(settings.gate, inputs.teacher_gap, inputs.entropy, settings.gate_sharpness)
    loss = compute_gated_distillation(inputs.policy_logprobs, inputs.teacher_gap, gate)
    return loss, {"gate_mean": gate, "gate_open_share": gate > settings.gate_open_threshold}


def _constant_gate_term(inputs: TokenInputs, settings: LossSettings) -> tuple[Tensor, Metrics]:
    return compute_gated_distillation(
        inputs.policy_logprobs, inputs.teacher_gap, settings.constant_gate
    ), {}


def _opsd_term(inputs: TokenInputs, settings: LossSettings) -> tuple[Tensor, Metrics]:
    bound = settings.opsd_gap_bound
    return compute_reverse_kl_distillation(
        inputs.policy_logprobs, inputs.teacher_gap, gap_bound=bound
    ), {}


def _skill_sd_term(inputs: TokenInputs, settings: LossSettings) -> tuple[Tensor, Metrics]:
    loss = compute_skill_sd(
        inputs.policy_logprobs,
        inputs.teacher_gap,
        inputs.behavior_logprobs,
        gap_bound=settings.skill_sd_gap_bound,
        log_ratio_bound=settings.skill_sd_log_ratio_bound,
    )
    return loss, {}


def _weighed(term: TermFunction) -> TermFunction:
    """`term` times the off-policy weight. As published, a distillation term on stale tokens is
    supervised learning on them.
    """

    def compute(inputs: TokenInputs, settings: LossSettings) -> tuple[Tensor, Metrics]:
        loss, metrics = term(inputs, settings)
        return (
            inputs.off_policy.distillation_weight * loss if settings.weigh_distillation else loss
        ), metrics

    return compute


def _distillation(name: str, compute: TermFunction) -> Term:
    return Term(name, compute, lambda settings: settings.distillation_weight, is_distillation=True)


POLICY_TERM = Term("policy", _policy_term, lambda settings: 1.0)
RLSD_POLICY_TERM = Term("policy", _rlsd_policy_term, lambda settings: 1.0)
KL_TERM = Term("kl", _kl_term, lambda settings: settings.kl_coefficient)
ENTROPY_TERM = Term("entropy", _entropy_term, lambda settings: settings.entropy_coefficient)
SDAR_TERM = _distillation("sdar", _weighed(_sdar_term))
CONSTANT_GATE_TERM = _distillation("constant_gate", _weighed(_constant_gate_term))
OPSD_TERM = _distillation("opsd", _weighed(_opsd_term))
SKILL_SD_TERM = _distillation("skill_sd", _skill_sd_term)

_GRPO = (POLICY_TERM, KL_TERM, ENTROPY_TERM)

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("grpo", _GRPO, needs_teacher=False),
        Method("skill_grpo", _GRPO, needs_teacher=False, student_sees_skills=True),
        Method("sdar", (*_GRPO, SDAR_TERM), needs_teacher=True),
        Method("constant_gate", (*_GRPO, CONSTANT_GATE_TERM), needs_teacher=True),
        Method("grpo_opsd", (*_GRPO, OPSD_TERM), needs_teacher=True),
        Method("opsd", (OPSD_TERM, KL_TERM, ENTROPY_TERM), needs_teacher=True),
        Method("skill_sd", (*_GRPO, SKILL_SD_TERM), needs_teacher=True),
        Method("rlsd", (RLSD_POLICY_TERM, KL_TERM, ENTROPY_TERM), needs_teacher=True),
    )
}


def get_method(name: str) -> Method:
    """The method called `name`. Raises ConfigurationError naming the known ones."""
    if name not in METHODS:
        raise ConfigurationError(f"Unknown method {name!r}. Known: {', '.join(sorted(METHODS))}.")
    return METHODS[name]


def compute_loss(
    method: Method,
    micro_batch: MicroBatch,
    *,
    policy_logprobs: Float[Tensor, " N"],
    entropy: Float[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"] | None = None,
    proximal_logprobs: Float[Tensor, " N"] | None = None,
    num_tokens_global: int,
    settings: LossSettings,
    update_index: int,
    learner_version: int,
) -> tuple[Float[Tensor, ""], Metrics]:
    """This micro-batch's share of the batch's loss, and sums of measurements over its tokens.

    The shares of all micro-batches of all ranks add up to the loss. A framework that averages
    gradients over ranks or micro-batches must be given the share times that number.

    Args:
        policy_logprobs, entropy: of the policy being trained, with gradient; all log-probs score
            the same N tokens.
        ref_logprobs: of the frozen reference; required if `method.needs_reference(settings)`.
        proximal_logprobs: of the weights this update began with; None on the first optimizer step
            of a batch.
        num_tokens_global: sampled tokens of the whole batch, over all micro-batches and ranks:
            every term's denominator.
        update_index: optimizer updates done so far in the run; drives schedules.
        learner_version: policy version of the weights this update began with.

    Returns:
        the loss (0 with a gradient graph if N is 0) and sums that `reduce_metrics` turns into means
            once added up.

    Raises:
        ContractError: teacher scores or reference log-probs are missing, or there is no token to
            train on.
    """
    if num_tokens_global < max(1, micro_batch.num_response_tokens):
        raise ContractError(
            f"num_tokens_global {num_tokens_global} for a micro-batch of "
            f"{micro_batch.num_response_tokens} sampled tokens. "
            "Pass the whole batch's count, and never train on a batch without tokens."
        )
    inputs = _gather_inputs(
        method,
        micro_batch,
        policy_logprobs,
        entropy,
        ref_logprobs,
        proximal_logprobs,
        settings,
        update_index,
    )
    every_token = torch.ones_like(inputs.is_scored)
    loss = masked_sum(policy_logprobs, ~every_token)
    metrics = _measure(
        inputs,
        micro_batch,
        policy_logprobs if proximal_logprobs is None else proximal_logprobs,
        learner_version,
    )
    for term in method.terms:
        coefficient = term.coefficient(settings)
        if coefficient == 0:
            continue
        values, measured = term.compute(inputs, settings)
        mask = inputs.is_scored if term.is_distillation else every_token
        share = masked_mean(values, mask, denominator=num_tokens_global)
        loss = loss + coefficient * share
        metrics[f"loss_{term.name}"] = masked_sum(values.detach(), mask)
        metrics |= {
            name: masked_sum(value.detach().to(values.dtype), mask)
            for name, value in measured.items()
        }
    return loss, metrics


def _gather_inputs(
    method: Method,
    micro_batch: MicroBatch,
    policy_logprobs: Tensor,
    entropy: Tensor,
    ref_logprobs: Tensor | None,
    proximal_logprobs: Tensor | None,
    settings: LossSettings,
    update_index: int,
) -> TokenInputs:
    teacher = micro_batch.teacher_logprobs
    if teacher is None:
        if method.needs_teacher:
            raise ContractError(
                f"Method {method.name} needs teacher_logprobs, the micro-batch has none. Train on "
                "scored data."
            )
        teacher = torch.full_like(policy_logprobs, -math.inf)
    is_scored = torch.isfinite(teacher)
    off_policy = compute_off_policy_weights(
        settings.off_policy,
        policy_logprobs,
        micro_batch.behavior_logprobs,
        proximal_logprobs,
        cap=settings.off_policy_cap,
        icepop_low=settings.icepop_low,
        log_ratio_bound=settings.log_ratio_bound,
    )
    return TokenInputs(
        policy_logprobs=policy_logprobs,
        entropy=entropy,
        behavior_logprobs=micro_batch.behavior_logprobs,
        advantages=micro_batch.advantages,
        ref_logprobs=ref_logprobs,
        teacher_gap=compute_teacher_gap(policy_logprobs, teacher, is_scored),
        is_scored=is_scored,
        off_policy=off_policy,
        update_index=update_index,
    )


@torch.no_grad()
def _measure(
    inputs: TokenInputs, micro_batch: MicroBatch, proximal: Tensor, learner_version: int
) -> Metrics:
    """Sums over the micro-batch's tokens. `engine_mismatch_abs` compares the sampler with the
    learner on tokens of the very weights this update began with: there, any difference comes from
    the engines and not from staleness."""
    every_token = torch.ones_like(inputs.is_scored)
    is_current = micro_batch.policy_versions == learner_version
    distance = (proximal - inputs.behavior_logprobs).abs()
    weights = inputs.off_policy
    sums = {
        "entropy": (inputs.entropy, every_token),
        "policy_behavior_gap_abs": (distance, every_token),
        "off_policy_weight_mean": (weights.policy_weight, every_token),
        "distillation_weight_mean": (weights.distillation_weight, every_token),
        "off_policy_bounded_share": (weights.is_bounded, every_token),
        "staleness_mean": (learner_version - micro_batch.policy_versions, every_token),
        "advantage_abs": (inputs.advantages.abs(), every_token),
        "engine_mismatch_abs": (distance, is_current),
        "teacher_gap_mean": (inputs.teacher_gap, inputs.is_scored),
        "teacher_gap_abs": (inputs.teacher_gap.abs(), inputs.is_scored),
        "num_tokens": (every_token, every_token),
        "num_current_tokens": (is_current, every_token),
        "num_scored_tokens": (inputs.is_scored, every_token),
    }
    return {
        name: masked_sum(value.to(inputs.entropy.dtype), mask)
        for name, (value, mask) in sums.items()
    }


def reduce_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Means from sums added up over micro-batches and ranks; a metric without any token to measure
    is left out.

    Counts (`num_*`) stay as they are. `gate_mean` near 0.5 with `teacher_gap_abs` near 0 means that
    the skills never reach the teacher's prompt.
    """
    means = {name: value for name, value in sums.items() if name.startswith("num_")}
    for name, value in sums.items():
        # A term's own value (`loss_<term>`) is divided by all tokens, as the loss is.
        denominator = sums[DENOMINATORS.get(name, "num_tokens")]
        if name not in means and denominator > 0:
            means[name] = value / denominator
    return means
