import math
from collections import Counter

import numpy as np
import pytest
import torch

from sdar.algorithms.batching import build_microbatches, build_sequences, count_response_tokens
from sdar.algorithms.logprobs import TokenScorer
from sdar.algorithms.loss import compute_loss, join_metrics, reduce_metrics
from sdar.config import MethodConfig
from sdar.contracts.errors import ContractError
from sdar.contracts.methods import METHODS

from .builders import (
    central_difference,
    make_model,
    make_random_batch,
    make_scored,
    make_trajectory,
    make_turn,
)

VERSION = 2
NO_TEACHER = {"grpo", "skill_grpo"}
SETTINGS = MethodConfig(distillation_weight=0.3, kl_coefficient=0.2, entropy_coefficient=0.1)
LAMBDA_ONLY = MethodConfig(distillation_weight=1.0, kl_coefficient=0.0, off_policy="none")


def change(settings, **update):
    return settings.model_copy(update=update)


def four_tokens(
    teacher=(-0.5, -2.5, -0.5, -1.0),
    behavior=(-1.0, -2.0, -0.5, -3.0),
    advantage=0.0,
    versions=(2, 2, 1, 0),
):
    trajectory = make_trajectory(
        make_turn(0, [1], [5, 6, 7, 8], logprobs=behavior, versions=versions)
    )
    item = make_scored(trajectory, None if teacher is None else [teacher])
    [[batch]] = build_microbatches(
        build_sequences([item], [np.array([advantage])]), token_budget=100
    )
    return batch


def loss_of(name, batch, student, settings=LAMBDA_ONLY, num_tokens=4, **changes):
    """Loss, gradient and metrics for given student log-probs, at update 0."""
    student = torch.tensor(student, requires_grad=True)
    arguments = {
        "entropy": torch.zeros(4),
        "num_tokens_global": num_tokens,
        "update_index": 0,
        "learner_version": VERSION,
    }
    loss, sums = compute_loss(
        batch,
        policy_logprobs=student,
        settings=change(settings, name=name),
        **(arguments | changes),
    )
    loss.backward()
    return loss.item(), student.grad.tolist(), {key: value.item() for key, value in sums.items()}


def test_sdar_reproduces_the_published_vector_with_an_unscored_token():
    """S = [-1, -2, -.5, -3], T = [-.5, -2.5, -.5, NaN]; three scored tokens are the denominator
    here.
    """
    batch = four_tokens(teacher=(-0.5, -2.5, -0.5, math.nan))
    loss, gradient, sums = loss_of("sdar", batch, [-1.0, -2.0, -0.5, -3.0], num_tokens=4)
    assert loss * 4 / 3 == pytest.approx(0.141381, abs=1e-6)
    assert [g * 4 / 3 for g in gradient] == pytest.approx(
        [-0.308047, -0.025286, -0.166667, 0.0], abs=1e-6
    )
    means = reduce_metrics(sums)
    assert (means["num_scored_tokens"], means["num_tokens"]) == (3, 4)
    assert means["gate_mean"] == pytest.approx((0.924142 + 0.075858 + 0.5) / 3, abs=1e-6)
    assert means["gate_open_share"] == pytest.approx(1 / 3)
    assert means["teacher_gap_mean"] == pytest.approx(0.0, abs=1e-6)
    assert means["teacher_gap_abs"] == pytest.approx(1 / 3)


def test_grpo_on_fresh_tokens_is_the_plain_policy_gradient():
    loss, gradient, _ = loss_of(
        "grpo", four_tokens(teacher=None, advantage=1.5), [-1.0, -2.0, -0.5, -3.0]
    )
    assert loss == pytest.approx(-1.5)
    assert gradient == pytest.approx([-1.5 / 4] * 4)


def test_stale_tokens_are_weighed_in_policy_and_distillation_unless_told_otherwise():
    """Every token is e^-1 times as likely now as when it was sampled."""
    student, weight = [-2.0, -3.0, -1.5, -4.0], math.exp(-1)
    corrected = change(LAMBDA_ONLY, off_policy="decoupled")
    published = change(corrected, weigh_distillation=False)
    batch = four_tokens(teacher=student, advantage=1.0)
    policy = -weight / 4
    assert loss_of("constant_gate", batch, student, corrected)[1] == pytest.approx(
        [policy - weight / 4] * 4
    )
    assert loss_of("constant_gate", batch, student, published)[1] == pytest.approx(
        [policy - 1 / 4] * 4
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("constant_gate", LAMBDA_ONLY),
        ("sdar", change(LAMBDA_ONLY, gate_sharpness=0.0)),
    ],
)
def test_controls_have_a_gradient_that_no_teacher_changes(name, settings):
    student = [-1.0, -2.0, -0.5, -3.0]
    one, other = (
        four_tokens(advantage=0.7),
        four_tokens(teacher=(-9.0, -0.1, -3.0, -0.2), advantage=0.7),
    )
    assert loss_of(name, one, student, settings)[1] == loss_of(name, other, student, settings)[1]


@pytest.mark.parametrize("name", sorted(set(METHODS) - NO_TEACHER - {"constant_gate"}))
def test_every_other_teacher_method_follows_its_teacher(name):
    student = [-1.0, -2.0, -0.5, -3.0]
    one, other = (
        four_tokens(advantage=0.7),
        four_tokens(teacher=(-9.0, -0.1, -3.0, -0.2), advantage=0.7),
    )
    assert loss_of(name, one, student)[1] != loss_of(name, other, student)[1]


def test_opsd_alone_ignores_advantages():
    student = [-1.0, -2.0, -0.5, -3.0]
    assert (
        loss_of("opsd", four_tokens(advantage=9.0), student)[1]
        == loss_of("opsd", four_tokens(), student)[1]
    )
    assert loss_of("opsd", four_tokens(), student)[1] == pytest.approx(
        [-0.5 / 4, 0.5 / 4, 0.0, -2.0 / 4]
    )


def test_rlsd_decays_into_grpo():
    student, batch = [-1.0, -2.0, -0.5, -3.0], four_tokens(advantage=1.0)
    early, late = (
        loss_of("rlsd", batch, student)[1],
        loss_of("rlsd", batch, student, update_index=100)[1],
    )
    shaped = [
        0.5 + 0.5 * m for m in (1.2, 0.8, 1.0, 1.2)
    ]  # exp(D) for D = .5, -.5, 0, 2, clipped to 1 +- 0.2
    assert early == pytest.approx([-s / 4 for s in shaped])
    assert late == pytest.approx([-1 / 4] * 4)


def test_metrics_tell_staleness_from_engine_mismatch():
    """Tokens 0 and 1 are of the learner's own version, off by 0.01 and 0.03; token 2 is one version
    old, token 3 two.
    """
    batch = four_tokens(behavior=(-1.01, -2.03, -0.9, -3.5))
    means = reduce_metrics(loss_of("sdar", batch, [-1.0, -2.0, -0.5, -3.0])[2])
    assert means["engine_mismatch_abs"] == pytest.approx(0.02, abs=1e-6)
    assert means["policy_behavior_gap_abs"] == pytest.approx(
        (0.01 + 0.03 + 0.4 + 0.5) / 4, abs=1e-6
    )
    assert means["num_current_tokens"] == 2


def test_metrics_without_anything_to_measure_are_left_out():
    means = reduce_metrics(
        loss_of("grpo", four_tokens(teacher=None, versions=(0, 0, 0, 0)), [-1.0] * 4)[2]
    )
    assert not {"teacher_gap_mean", "gate_mean", "engine_mismatch_abs"} & set(means)


def make_case(name, num_trajectories=5):
    items, advantages = make_random_batch(
        np.random.default_rng(3), num_trajectories, with_teacher=name not in NO_TEACHER
    )
    return build_sequences(items, advantages)


def train_once(name, sequences, token_budget, num_ranks, settings=SETTINGS):
    """Loss, gradients and metrics summed over all micro-batches of all ranks, with one model
    playing every rank.
    """
    model, reference = (
        make_model(seed=1, dtype=torch.float64),
        make_model(seed=2, dtype=torch.float64),
    )
    scorer, ref_scorer = (TokenScorer(m, temperature=1.0, chunk_size=3) for m in (model, reference))
    total, sums = 0.0, Counter()
    for batches in build_microbatches(sequences, token_budget, num_ranks):
        for batch in batches:
            inputs = (batch.input_ids, batch.response_mask, batch.max_rank_tokens)
            with torch.no_grad():
                ref_logprobs, _ = ref_scorer(*inputs)
            policy_logprobs, entropy = scorer(*inputs)
            loss, metrics = compute_loss(
                batch,
                policy_logprobs=policy_logprobs,
                entropy=entropy,
                ref_logprobs=ref_logprobs,
                num_tokens_global=count_response_tokens(sequences),
                settings=change(settings, name=name),
                update_index=10,
                learner_version=VERSION,
            )
            loss.backward()
            total += loss.item()
            sums.update({key: value.item() for key, value in metrics.items()})
    return total, torch.cat([p.grad.flatten() for p in model.parameters()]), reduce_metrics(sums)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_loss_gradient_and_metrics_do_not_depend_on_micro_batches_or_ranks(name):
    sequences = make_case(name)
    loss, gradient, metrics = train_once(name, sequences, token_budget=10_000, num_ranks=1)
    assert gradient.abs().max() > 1e-3
    for token_budget, num_ranks in ((1, 1), (25, 1), (40, 3), (10_000, 4)):
        other_loss, other_gradient, other_metrics = train_once(
            name, sequences, token_budget, num_ranks
        )
        assert other_loss == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-8, atol=1e-10)
        assert other_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["grpo", "opsd", "rlsd", "skill_sd"])
def test_composed_gradient_matches_finite_differences(name):
    """For the methods whose loss is a function of the student alone once gap and weights are held:
    with `none`, nothing is detached in the policy term but its own anchor, whose ratio has slope 1.
    """
    batch = four_tokens(advantage=0.7)
    student = torch.tensor([-1.1, -2.2, -0.4, -2.9], dtype=torch.float64)
    _, gradient, _ = loss_of(name, batch, student.tolist())
    teacher, behavior = (
        torch.tensor([-0.5, -2.5, -0.5, -1.0]),
        torch.tensor([-1.0, -2.0, -0.5, -3.0]),
    )

    def frozen(x):
        gap = teacher - student
        policy = -(0.7 * (x - student).exp()).mean()
        if name == "grpo":
            return policy
        if name == "opsd":
            return -(gap * x).mean()
        if name == "rlsd":
            return -(0.7 * (0.5 + 0.5 * gap.exp().clamp(0.8, 1.2)) * (x - student).exp()).mean()
        return policy + ((x - behavior).exp() * ((teacher - x).exp() - 1 + x - teacher)).mean()

    assert gradient == pytest.approx(central_difference(frozen, student).tolist(), abs=1e-5)


def test_entropy_gradient_arrives_only_with_a_coefficient():
    batch = four_tokens()
    for coefficient, want in ((0.0, None), (0.2, [-0.05] * 4)):
        entropy = torch.ones(4, requires_grad=True)
        loss_of(
            "sdar",
            batch,
            [-1.0] * 4,
            change(LAMBDA_ONLY, entropy_coefficient=coefficient),
            entropy=entropy,
        )
        assert (
            entropy.grad is None if want is None else entropy.grad.tolist() == pytest.approx(want)
        )


def test_empty_micro_batch_gives_zero_with_a_graph():
    batch = build_microbatches(make_case("sdar", 1)[:1], token_budget=100, num_ranks=2)[1][0]
    empty = torch.zeros(0, requires_grad=True)
    loss, sums = compute_loss(
        batch,
        policy_logprobs=empty,
        entropy=torch.zeros(0),
        ref_logprobs=torch.zeros(0),
        num_tokens_global=9,
        settings=SETTINGS,
        update_index=0,
        learner_version=0,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert not any(value.item() for value in sums.values())


def test_missing_inputs_are_named():
    student = [-1.0] * 4
    with pytest.raises(ContractError, match="sdar needs teacher_logprobs"):
        loss_of("sdar", four_tokens(teacher=None), student)
    with pytest.raises(ContractError, match="no ref_logprobs"):
        loss_of("grpo", four_tokens(), student, SETTINGS)
    with pytest.raises(ContractError, match="num_tokens_global 3 for a micro-batch of 4"):
        loss_of("grpo", four_tokens(), student, num_tokens=3)


def test_two_parts_of_a_loss_may_not_measure_one_name():
    one = {"entropy": torch.tensor(1.0), "gate_mean": torch.tensor(2.0)}
    with pytest.raises(ContractError, match="entropy"):
        join_metrics(one, {"entropy": torch.tensor(3.0)})
    assert join_metrics(one, {}) == one
