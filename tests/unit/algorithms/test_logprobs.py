import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdar.algorithms.logprobs import TokenScorer, compute_logprobs
from sdar.contracts.errors import ConfigurationError, ContractError

from .builders import VOCABULARY, make_model


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements any operation returned."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.num_elements = max(self.num_elements, value.numel())
        return result


def plain_logprobs(row, target, temperature):
    """Log-prob and entropy of one row of logits, in plain Python."""
    scaled = [value / temperature for value in row]
    top = max(scaled)
    normalizer = top + math.log(sum(math.exp(value - top) for value in scaled))
    return scaled[target] - normalizer, -sum(
        math.exp(v - normalizer) * (v - normalizer) for v in scaled
    )


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprobs_and_entropy_are_those_of_the_tempered_distribution(chunk_size, temperature):
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(5, 11), torch.randn(7, 5), torch.randint(0, 11, (7,))
    logprobs, entropy = compute_logprobs(hidden, head, targets, temperature, chunk_size)
    rows = head(hidden).tolist()
    want = [
        plain_logprobs(row, target, temperature)
        for row, target in zip(rows, targets.tolist(), strict=True)
    ]
    assert logprobs.tolist() == pytest.approx([w[0] for w in want], abs=1e-5)
    assert entropy.tolist() == pytest.approx([w[1] for w in want], abs=1e-5)
    assert logprobs.dtype == entropy.dtype == torch.float32


def test_gradients_of_logprobs_and_entropy_match_finite_differences():
    torch.manual_seed(0)
    head = torch.nn.Linear(3, 6, dtype=torch.float64)
    hidden, targets = (
        torch.randn(5, 3, dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 5, 2, 2, 1]),
    )
    assert torch.autograd.gradcheck(lambda h: compute_logprobs(h, head, targets, 0.7, 2), hidden)


def test_logits_of_one_chunk_at_most_exist_in_forward_and_backward():
    num_tokens, num_hidden, vocabulary, chunk_size = 64, 4, 500, 8
    hidden, head = (
        torch.randn(num_tokens, num_hidden, requires_grad=True),
        torch.nn.Linear(num_hidden, vocabulary),
    )
    with LargestTensor() as largest:
        logprobs, _ = compute_logprobs(
            hidden, head, torch.zeros(num_tokens, dtype=torch.long), 1.0, chunk_size
        )
        logprobs.sum().backward()
    assert largest.num_elements == chunk_size * vocabulary


def test_saved_for_backward_holds_no_logits():
    saved = []
    hidden, head = torch.randn(64, 4, requires_grad=True), torch.nn.Linear(4, 500)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        logprobs, _ = compute_logprobs(hidden, head, torch.zeros(64, dtype=torch.long), 1.0, 8)
    assert max(saved, default=0) < 8 * 500
    assert logprobs.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_scorer_matches_the_models_own_logits_and_gradient(tied):
    model = make_model(tied=tied)
    input_ids = torch.randint(0, VOCABULARY, (3, 9))
    mask = torch.rand(3, 9) < 0.5
    mask[:, 0] = False
    logprobs, _ = TokenScorer(model, temperature=0.8, chunk_size=4)(input_ids, mask)
    logprobs.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    logits = model(input_ids=input_ids).logits / 0.8
    every = torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    want = torch.stack([every[b, t - 1] for b in range(3) for t in range(9) if mask[b, t]])
    want.sum().backward()
    torch.testing.assert_close(logprobs, want, atol=1e-5, rtol=1e-5)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-4)


def test_right_padding_changes_no_score():
    scorer = TokenScorer(make_model(), temperature=1.0, chunk_size=8)
    ids, mask = (
        torch.randint(1, VOCABULARY, (1, 6)),
        torch.tensor([[False, False, True, True, False, True]]),
    )
    padded_ids = torch.nn.functional.pad(ids, (0, 5))
    padded_mask = torch.nn.functional.pad(mask, (0, 5))
    torch.testing.assert_close(
        scorer(padded_ids, padded_mask)[0], scorer(ids, mask)[0], atol=1e-5, rtol=1e-5
    )


def test_nothing_sampled_still_gives_every_parameter_a_zero_gradient():
    model = make_model()
    logprobs, entropy = TokenScorer(model, temperature=1.0, chunk_size=8)(
        torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool)
    )
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters()
    )


def test_ranks_with_different_token_counts_call_the_head_equally_often():
    """Every call gathers sharded weights from all ranks: one call more on one rank would hang them
    all.
    """
    calls = []
    for num_sampled in (0, 1, 9):
        model = make_model()
        count = []
        model.lm_head.register_forward_hook(lambda *_, count=count: count.append(1))
        mask = torch.zeros(1, 12, dtype=torch.bool)
        mask[0, 1 : 1 + num_sampled] = True
        logprobs, _ = TokenScorer(model, temperature=1.0, chunk_size=4)(
            torch.ones(1, 12, dtype=torch.long), mask, 9
        )
        logprobs.sum().backward()
        assert logprobs.shape == (num_sampled,)
        calls.append(len(count))
    assert calls == [6, 6, 6]  # ceil(9 / 4) chunks, once forward and once more in the backward pass


def test_scoring_without_gradient_makes_no_second_pass():
    model, count = make_model(), []
    model.lm_head.register_forward_hook(lambda *_: count.append(1))
    with torch.no_grad():
        TokenScorer(model, temperature=1.0, chunk_size=4)(
            torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool)
        )
    assert len(count) == 1


def test_bfloat16_model_still_gives_float32_logprobs():
    scorer = TokenScorer(make_model(dtype=torch.bfloat16), temperature=1.0, chunk_size=4)
    logprobs, entropy = scorer(
        torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool)
    )
    assert logprobs.dtype == entropy.dtype == torch.float32


def test_temperature_zero_and_too_few_chunks_are_refused():
    hidden, head, targets = (
        torch.randn(5, 3),
        torch.nn.Linear(3, 4),
        torch.zeros(5, dtype=torch.long),
    )
    with pytest.raises(ConfigurationError, match="temperature"):
        compute_logprobs(hidden, head, targets, 0.0, 2)
    with pytest.raises(ContractError, match="need 3 chunks of 2, got num_chunks 2"):
        compute_logprobs(hidden, head, targets, 1.0, 2, num_chunks=2)
