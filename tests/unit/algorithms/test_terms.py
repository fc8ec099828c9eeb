"""What every loss term promises, whatever it computes."""

import itertools

import pytest
import torch

from sdar.algorithms.terms import TERMS
from sdar.config import MethodConfig
from sdar.contracts.methods import TERM_FACTS

from .builders import make_inputs

every_term = pytest.mark.parametrize("name", TERMS.names())
SETTINGS = MethodConfig()


def test_every_term_has_its_facts_and_every_fact_its_term():
    assert set(TERMS.names()) == set(TERM_FACTS)


@every_term
def test_a_term_gives_each_token_a_finite_loss_and_finite_measurements(name):
    grid = list(itertools.product([-50.0, -1.0, 0.0], [-300.0, -1.0, 0.0, 1.0, 300.0]))
    logprobs = torch.tensor([logprob for logprob, _ in grid])
    inputs = make_inputs(
        [gap for _, gap in grid],
        policy_logprobs=logprobs.requires_grad_(),
        advantages=torch.linspace(-2.0, 2.0, len(grid)),
    )
    values, measured = TERMS[name](inputs, SETTINGS)
    for tensor in (values, *measured.values()):
        assert tensor.shape == (len(grid),)
        assert torch.isfinite(tensor.float()).all()
    if values.requires_grad:
        values.sum().backward()
        assert torch.isfinite(logprobs.grad).all()


@every_term
def test_a_term_takes_an_empty_micro_batch(name):
    values, _ = TERMS[name](make_inputs(torch.zeros(0)), SETTINGS)
    assert values.shape == (0,)


@every_term
def test_only_a_distillation_term_reads_the_teacher(name):
    logprobs = torch.tensor([-1.0, -2.0])
    values = []
    for gap in ([0.5, -1.5], [-2.0, 0.3]):
        inputs = make_inputs(gap, policy_logprobs=logprobs, advantages=torch.ones(2))
        values.append(TERMS[name](inputs, SETTINGS)[0])
    assert torch.equal(*values) is not TERM_FACTS[name].is_distillation


@every_term
def test_only_a_distillation_term_learns_where_no_advantage_is_left(name):
    """Of the terms that push: KL and entropy only hold the policy back."""
    if name in ("kl", "entropy"):
        return
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    inputs = make_inputs([0.5, -1.5], policy_logprobs=logprobs, advantages=torch.zeros(2))
    values, _ = TERMS[name](inputs, SETTINGS)
    values.sum().backward()
    assert bool(logprobs.grad.any()) is TERM_FACTS[name].is_distillation


@every_term
def test_only_a_term_that_says_so_reads_the_reference(name):
    values = []
    for ref_logprob in (-1.0, -3.0):
        ref_logprobs = torch.full((2,), ref_logprob)
        inputs = make_inputs([0.5, -1.5], ref_logprobs=ref_logprobs, advantages=torch.ones(2))
        values.append(TERMS[name](inputs, SETTINGS)[0])
    assert torch.equal(*values) is not TERM_FACTS[name].reads_reference
