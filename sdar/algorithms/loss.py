"""The loss of a method on one micro-batch, and the measurements made beside it.

A method is data (`sdar.contracts.methods`). `compute_loss` sums each of its terms over the tokens
and divides by the *batch's* token count, so that micro-batches and ranks simply add up. There are
no flags for terms: a term with coefficient 0 is not evaluated.

Axes: N sampled tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdar.algorithms.batching import MicroBatch
from sdar.algorithms.corrections import compute_off_policy_weights
from sdar.algorithms.distillation import compute_teacher_gap
from sdar.algorithms.inputs import TokenInputs
from sdar.algorithms.measurements import DENOMINATORS, TOKEN_COUNTS
from sdar.algorithms.reducers import REDUCERS
from sdar.algorithms.reductions import masked_mean, masked_sum
from sdar.algorithms.schedules import SCHEDULES
from sdar.algorithms.terms import TERMS, Metrics
from sdar.contracts.errors import ContractError
from sdar.contracts.methods import TERM_FACTS, LossSettings, get_method


def compute_loss(
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
        ref_logprobs: of the frozen reference; required if `needs_reference(settings)`.
        proximal_logprobs: of the weights this update began with; None on the first optimizer step
            of a batch.
        num_tokens_global: sampled tokens of the whole batch, over all micro-batches and ranks:
            every term's denominator.
        settings: names the method, and every number of its loss.
        update_index: optimizer updates done so far in the run; drives schedules.
        learner_version: policy version of the weights this update began with.

    Returns:
        the loss (0 with a gradient graph if N is 0) and sums that `reduce_metrics` turns into means
            once added up.

    Raises:
        ContractError: teacher scores or reference log-probs are missing, or there is no token to
            train on.
    """
    _check_token_count(micro_batch, num_tokens_global)
    inputs = _gather_inputs(
        micro_batch,
        policy_logprobs,
        entropy,
        ref_logprobs,
        proximal_logprobs,
        settings,
        update_index,
    )
    # On the first step of a batch the policy still is the proximal one.
    proximal = policy_logprobs if proximal_logprobs is None else proximal_logprobs
    metrics = _measure(inputs, micro_batch, proximal, learner_version)
    loss, of_terms = _add_terms(inputs, settings, num_tokens_global)
    return loss, join_metrics(metrics, of_terms)


def _check_token_count(micro_batch: MicroBatch, num_tokens_global: int) -> None:
    if num_tokens_global < max(1, micro_batch.num_response_tokens):
        raise ContractError(
            f"num_tokens_global {num_tokens_global} for a micro-batch of "
            f"{micro_batch.num_response_tokens} sampled tokens. "
            "Pass the whole batch's count, and never train on a batch without tokens."
        )


def _gather_inputs(
    micro_batch: MicroBatch,
    policy_logprobs: Float[Tensor, " N"],
    entropy: Float[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"] | None,
    proximal_logprobs: Float[Tensor, " N"] | None,
    settings: LossSettings,
    update_index: int,
) -> TokenInputs:
    off_policy = compute_off_policy_weights(
        settings.off_policy,
        policy_logprobs,
        micro_batch.behavior_logprobs,
        proximal_logprobs,
        cap=settings.off_policy_cap,
    )
    weights = off_policy.distillation_weight
    teacher_gap, is_scored = _compare_with_teacher(micro_batch, policy_logprobs, settings)
    return TokenInputs(
        policy_logprobs=policy_logprobs,
        entropy=entropy,
        behavior_logprobs=micro_batch.behavior_logprobs,
        advantages=micro_batch.advantages,
        ref_logprobs=ref_logprobs,
        teacher_gap=teacher_gap,
        is_scored=is_scored,
        turn_index=micro_batch.turn_index,
        off_policy=off_policy,
        distillation_weight=weights if settings.weigh_distillation else torch.ones_like(weights),
        teacher_weight=SCHEDULES[get_method(settings.name).schedule](update_index, settings),
    )


def _compare_with_teacher(
    micro_batch: MicroBatch, policy_logprobs: Float[Tensor, " N"], settings: LossSettings
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """The reduced gap, and which tokens the teacher scored."""
    method = get_method(settings.name)
    teacher = micro_batch.teacher_logprobs
    if teacher is None:
        if method.needs_teacher:
            raise ContractError(
                f"Method {settings.name} needs teacher_logprobs, the micro-batch has none. Train "
                "on scored data."
            )
        # As if the teacher had scored no token: every mask over scored tokens is then empty.
        teacher = torch.full_like(policy_logprobs, -math.inf)
    # A teacher may give a token no probability at all; what is computed from that stays out.
    is_scored = torch.isfinite(teacher)
    gap = compute_teacher_gap(policy_logprobs, teacher, is_scored)
    return REDUCERS[method.reducer](gap, is_scored, micro_batch), is_scored


def _add_terms(
    inputs: TokenInputs, settings: LossSettings, num_tokens_global: int
) -> tuple[Float[Tensor, ""], Metrics]:
    """The weighed sum of the method's terms, and the sums that they measured."""
    every_token = torch.ones_like(inputs.is_scored)
    # 0, but with a graph: a rank whose micro-batch is empty still has to run its backward pass.
    loss = masked_sum(inputs.policy_logprobs, ~every_token)
    metrics: Metrics = {}
    for name in get_method(settings.name).terms:
        facts = TERM_FACTS[name]
        # The schedule is the teacher's: it fades what is distilled and nothing else.
        coefficient = facts.coefficient(settings)
        if facts.is_distillation:
            coefficient *= inputs.teacher_weight
        if coefficient == 0:
            continue
        values, measured = TERMS[name](inputs, settings)
        mask = inputs.is_scored if facts.is_distillation else every_token
        share = masked_mean(values, mask, denominator=num_tokens_global)
        loss = loss + coefficient * share
        # Without its coefficient, so that terms can be compared between runs.
        measured = {**measured, f"loss_{name}": values}
        sums = {
            key: masked_sum(value.detach().to(values.dtype), mask)
            for key, value in measured.items()
        }
        metrics = join_metrics(metrics, sums)
    return loss, metrics


def join_metrics(metrics: Metrics, others: Metrics) -> Metrics:
    """Both together. Raises ContractError if one name stands for two measurements."""
    if shared := metrics.keys() & others.keys():
        raise ContractError(
            f"Two parts of the loss measure {', '.join(sorted(shared))}. Give one of them another "
            "name."
        )
    return metrics | others


@torch.no_grad()
def _measure(
    inputs: TokenInputs, micro_batch: MicroBatch, proximal: Tensor, learner_version: int
) -> Metrics:
    """Sums over the micro-batch's tokens."""
    every_token = torch.ones_like(inputs.is_scored)
    # On tokens of the very weights that this update began with, the sampler and the learner differ
    # only by their engines and not by staleness.
    is_current = micro_batch.policy_versions == learner_version
    distance = (proximal - inputs.behavior_logprobs).abs()
    weights = inputs.off_policy
    # Each: values, and the tokens over which they count.
    sums = {
        "entropy": (inputs.entropy, every_token),
        "policy_behavior_gap_abs": (distance, every_token),
        "off_policy_weight_mean": (weights.policy_weight, every_token),
        "distillation_weight_mean": (weights.distillation_weight, every_token),
        "off_policy_bounded_share": (weights.is_bounded, every_token),
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
    """Means from sums added up over micro-batches and ranks.

    A metric without any token to measure is left out.
    Counts stay as they are. `gate_mean` near 0.5 with `teacher_gap_abs` near 0 means that
    the skills never reach the teacher's prompt.
    """
    means: dict[str, float] = {}
    for name, value in sums.items():
        if name in TOKEN_COUNTS:
            means[name] = value
            continue
        # A term's own value is divided by all tokens, as the loss is.
        is_term = name.startswith("loss_")
        denominator = sums["num_tokens" if is_term else DENOMINATORS[name]]
        if denominator > 0:
            means[name] = value / denominator
    return means
