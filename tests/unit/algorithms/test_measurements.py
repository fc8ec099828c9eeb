import pytest
import torch

from sdar.algorithms.loss import reduce_metrics
from sdar.algorithms.measurements import DENOMINATORS, TOKEN_COUNTS
from sdar.contracts.methods import METHODS

from .test_loss import SETTINGS, four_tokens, loss_of


@pytest.mark.parametrize("name", sorted(METHODS))
def test_whatever_a_method_measures_is_declared(name):
    references = torch.tensor([-1.5, -1.5, -1.0, -2.0])
    batch, student = four_tokens(advantage=1.0), [-1.0, -2.0, -0.5, -3.0]
    means = reduce_metrics(loss_of(name, batch, student, SETTINGS, ref_logprobs=references)[2])
    terms = {f"loss_{term}" for term in METHODS[name].terms}
    assert means.keys() - terms <= DENOMINATORS.keys() | TOKEN_COUNTS.keys()


def test_whatever_is_declared_is_measured_by_some_method():
    references = torch.tensor([-1.5, -1.5, -1.0, -2.0])
    batch, student = four_tokens(advantage=1.0), [-1.0, -2.0, -0.5, -3.0]
    measured = set()
    for name in METHODS:
        measured |= loss_of(name, batch, student, SETTINGS, ref_logprobs=references)[2].keys()
    assert measured >= DENOMINATORS.keys() | TOKEN_COUNTS.keys()


def test_every_denominator_is_a_count():
    assert set(DENOMINATORS.values()) <= TOKEN_COUNTS.keys()
