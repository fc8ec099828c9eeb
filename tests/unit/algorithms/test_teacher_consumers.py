"""What every schedule, reducer of the gap and shaping of the advantages promises."""

import numpy as np
import pytest
import torch

from sdar.algorithms.batching import build_microbatches, build_sequences
from sdar.algorithms.reducers import REDUCERS
from sdar.algorithms.schedules import SCHEDULES
from sdar.algorithms.shaping import SHAPINGS
from sdar.config import MethodConfig

from .builders import make_inputs, make_random_batch

every_schedule = pytest.mark.parametrize("name", SCHEDULES.names())
every_reducer = pytest.mark.parametrize("name", REDUCERS.names())
every_shaping = pytest.mark.parametrize("name", SHAPINGS.names())
SETTINGS = MethodConfig()


@every_schedule
@pytest.mark.parametrize("update_index", [0, 1, 99, 100, 101, 10_000_000])
def test_a_schedule_is_a_factor_between_zero_and_one(name, update_index):
    assert 0.0 <= SCHEDULES[name](update_index, SETTINGS) <= 1.0


@every_schedule
def test_a_schedule_depends_on_the_update_alone(name):
    """So a resumed run goes on where it was: no checkpoint holds a schedule."""
    factors = [SCHEDULES[name](update, SETTINGS) for update in (7, 3, 7)]
    assert factors[0] == factors[2]


def make_batch():
    items, advantages = make_random_batch(np.random.default_rng(5), 4)
    ((batch,),) = build_microbatches(build_sequences(items, advantages), token_budget=10_000)
    return batch


@every_reducer
def test_a_reduced_gap_is_finite_has_no_gradient_and_is_zero_where_nothing_was_scored(name):
    batch = make_batch()
    generator = torch.Generator().manual_seed(0)
    is_scored = torch.rand(batch.num_response_tokens, generator=generator) < 0.7
    gap = torch.randn(batch.num_response_tokens, generator=generator) * is_scored
    reduced = REDUCERS[name](gap, is_scored, batch)
    assert reduced.shape == gap.shape
    assert torch.isfinite(reduced).all()
    assert not reduced.requires_grad
    assert not reduced[~is_scored].any()


@every_reducer
def test_a_reducer_brings_nothing_in_from_another_turn(name):
    batch = make_batch()
    is_scored = torch.ones(batch.num_response_tokens, dtype=torch.bool)
    of_one_turn = (batch.trajectory_index == batch.trajectory_index[0]) & (
        batch.turn_index == batch.turn_index[0]
    )
    gap = torch.linspace(-1.0, 1.0, batch.num_response_tokens)
    changed = torch.where(of_one_turn, gap + 3.0, gap)
    before, after = REDUCERS[name](gap, is_scored, batch), REDUCERS[name](changed, is_scored, batch)
    assert torch.equal(before[~of_one_turn], after[~of_one_turn])
    assert not torch.equal(before[of_one_turn], after[of_one_turn])


def shape(name, gaps, advantages, **changes):
    inputs = make_inputs(gaps, advantages=torch.tensor(advantages), **changes)
    return SHAPINGS[name](inputs, SETTINGS)


@every_shaping
def test_shaped_advantages_are_finite_and_have_no_gradient_whatever_the_gap(name):
    student = torch.tensor([-1.0] * 4, requires_grad=True)
    shaped = shape(name, [-1e4, -1.0, 1.0, 1e4], [2.0, -2.0, 0.0, -1.0], policy_logprobs=student)
    assert shaped.shape == (4,)
    assert torch.isfinite(shaped).all()
    assert not shaped.requires_grad


@every_shaping
def test_where_the_teacher_says_nothing_the_advantage_stays(name):
    advantages = [2.0, -2.0, 0.0]
    assert shape(name, [0.0, 0.0, 0.0], advantages).tolist() == pytest.approx(advantages)


@every_shaping
def test_a_teacher_that_has_faded_out_shapes_nothing(name):
    advantages = [2.0, -2.0, 0.5]
    assert shape(name, [3.0, 3.0, -1.0], advantages, teacher_weight=0.0).tolist() == advantages


@every_shaping
def test_a_teacher_that_disagrees_with_itself_changes_the_advantages(name):
    assert shape(name, [0.5, -0.5], [1.0, 1.0]).tolist() != [1.0, 1.0]
