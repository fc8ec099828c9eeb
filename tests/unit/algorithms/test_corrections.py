import math

import pytest
import torch

from sdar.algorithms.corrections import CORRECTIONS, compute_off_policy_weights
from sdar.contracts.errors import ConfigurationError, ContractError

LOG = [math.log(x) for x in (0.25, 0.5, 1.0, 1.5, 8.0)]
BEHAVIOR = torch.full((5,), -3.0)


def weights_of(correction, current, proximal=None, behavior=BEHAVIOR, cap=5.0):
    return compute_off_policy_weights(correction, current, behavior, proximal, cap=cap)


def from_behavior(log_ratios):
    return BEHAVIOR + torch.tensor(log_ratios)


def test_none_ignores_how_old_a_token_is_and_keeps_the_plain_gradient():
    current = from_behavior(LOG).requires_grad_()
    weights = weights_of("none", current)
    weights.ratio.sum().backward()
    assert weights.ratio.tolist() == [1.0] * 5
    assert current.grad.tolist() == [1.0] * 5
    assert weights.policy_weight.tolist() == weights.distillation_weight.tolist() == [1.0] * 5


def test_truncated_is_weighs_by_the_capped_ratio():
    weights = weights_of("truncated_is", from_behavior(LOG), cap=2.0)
    assert weights.ratio.tolist() == [1.0] * 5
    assert weights.policy_weight.tolist() == pytest.approx([0.25, 0.5, 1.0, 1.5, 2.0])
    assert weights.is_bounded.tolist() == [False, False, False, False, True]


def test_decoupled_clips_around_the_proximal_policy_and_caps_the_behavior_weight():
    """Behavior to proximal as in LOG; the first optimizer step then moved every token by +0.1."""
    weights = weights_of("decoupled", from_behavior(LOG) + 0.1, proximal=from_behavior(LOG))
    assert weights.ratio.tolist() == pytest.approx([math.exp(0.1)] * 5, rel=1e-5)
    assert weights.policy_weight.tolist() == pytest.approx([0.25, 0.5, 1.0, 1.5, 5.0])
    moved = [x * math.exp(0.1) for x in (0.25, 0.5, 1.0, 1.5)]
    assert weights.distillation_weight.tolist() == pytest.approx([*moved, 5.0], rel=1e-5)


def test_icepop_drops_tokens_outside_its_band():
    weights = weights_of(
        "icepop", from_behavior([math.log(x) for x in (0.4, 0.6, 1.0, 1.9, 2.1)]), cap=2.0
    )
    assert weights.policy_weight.tolist() == pytest.approx([0.0, 0.6, 1.0, 1.9, 0.0])
    assert weights.is_bounded.tolist() == [True, False, False, False, True]


every_correction = pytest.mark.parametrize("correction", CORRECTIONS.names())


@every_correction
def test_fresh_tokens_are_not_corrected(correction):
    weights = weights_of(correction, BEHAVIOR.clone())
    assert weights.ratio.tolist() == [1.0] * 5
    assert weights.policy_weight.tolist() == weights.distillation_weight.tolist() == [1.0] * 5
    assert not weights.is_bounded.any()


@every_correction
def test_only_the_ratio_has_a_gradient_and_it_survives_absurd_ratios(correction):
    current = torch.tensor([-1e4, -1.0, -1e4], requires_grad=True)
    weights = weights_of(correction, current, behavior=torch.tensor([-1.0, -1e4, -1e4]))
    assert not any(x.requires_grad for x in (weights.policy_weight, weights.distillation_weight))
    (weights.ratio * weights.policy_weight).sum().backward()
    assert torch.isfinite(current.grad).all()


@every_correction
@pytest.mark.parametrize("behavior", [-math.inf, -1e4, -1.0, 0.0])
def test_weights_are_finite_never_negative_and_at_most_the_cap(correction, behavior):
    current = torch.tensor([-50.0, -1.0, 0.0])
    weights = weights_of(correction, current, behavior=torch.full((3,), behavior), cap=2.0)
    for values in (weights.policy_weight, weights.distillation_weight):
        assert values.shape == current.shape
        assert ((values >= 0) & (values <= 2.0)).all()


@every_correction
def test_an_empty_micro_batch_has_no_weights(correction):
    weights = weights_of(correction, torch.zeros(0), behavior=torch.zeros(0))
    assert [len(values) for values in weights] == [0, 0, 0, 0]


def test_an_unknown_correction_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'v_trace'\. Known: decoupled, icepop, none"):
        weights_of("v_trace", BEHAVIOR)


def test_truncated_importance_sampling_is_unbiased_under_a_cap_that_never_binds():
    """Expected weighed gradient over behavior samples equals the on-policy one, computed over the
    whole vocabulary.
    """
    logits = torch.tensor([0.5, -0.3, 1.0], dtype=torch.float64, requires_grad=True)
    behavior = torch.log_softmax(torch.tensor([0.0, 0.4, 0.2], dtype=torch.float64), -1)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    current = torch.log_softmax(logits, -1)
    weights = weights_of("truncated_is", current, behavior=behavior, cap=100.0)
    (behavior.exp() * weights.policy_weight * weights.ratio * rewards).sum().backward()
    sampled = logits.grad.clone()
    logits.grad = None
    (torch.softmax(logits, -1) * rewards).sum().backward()
    torch.testing.assert_close(sampled, logits.grad)


def test_logprobs_of_different_lengths_are_refused():
    with pytest.raises(ContractError, match="same sampled tokens"):
        weights_of("decoupled", torch.zeros(4))
