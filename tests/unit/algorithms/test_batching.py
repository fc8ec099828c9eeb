import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar.algorithms.batching import (
    build_microbatches,
    build_privileged_sequences,
    build_sequences,
    count_response_tokens,
    split_by_turn,
)
from sdar.contracts.errors import ContractError

from .builders import make_random_batch, make_scored, make_trajectory, make_turn


def two_turns_then_fresh():
    """Turn 1 extends turn 0 by the delta 20 21; turn 2 begins anew.

    turn 0  prompt 1 2 3               response 10 11
    turn 1  prompt 1 2 3 10 11 20 21   response 12
    turn 2  prompt 4 5                 response 13 14
    """
    return make_trajectory(
        make_turn(0, [1, 2, 3], [10, 11], logprobs=[-0.1, -0.2], versions=[3, 3]),
        make_turn(1, [1, 2, 3, 10, 11, 20, 21], [12], extends=True, logprobs=[-0.3], versions=[4]),
        make_turn(2, [4, 5], [13, 14], logprobs=[-0.4, -0.5], versions=[5, 6]),
    )


def with_lengths(*lengths):
    """Sequences of one prompt token and length - 1 sampled ones."""
    items = [
        make_scored(make_trajectory(make_turn(0, [1], [7] * (n - 1)), index=i))
        for i, n in enumerate(lengths)
    ]
    return build_sequences(items)


def test_extending_turns_share_a_sequence_and_fresh_ones_begin_their_own():
    """token_ids     1 2 3 10 11 20 21 12 | 4 5 13 14
    response_mask .  . . . 1  1  .  .  1  | . . 1  1
    """
    item = make_scored(two_turns_then_fresh(), [[-1.0, -1.1], [-1.2], [-1.3, -1.4]])
    first, second = build_sequences([item], [np.array([0.5, -0.5, 2.0])])
    assert first.token_ids.tolist() == [1, 2, 3, 10, 11, 20, 21, 12]
    assert first.response_mask.tolist() == [False, False, False, True, True, False, False, True]
    assert first.behavior_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3])
    assert first.policy_versions.tolist() == [3, 3, 4]
    assert first.teacher_logprobs.tolist() == pytest.approx([-1.0, -1.1, -1.2])
    assert first.advantages.tolist() == [0.5, 0.5, -0.5]
    assert first.turn_index.tolist() == [0, 0, 1]
    assert second.token_ids.tolist() == [4, 5, 13, 14]
    assert second.response_mask.tolist() == [False, False, True, True]
    assert second.advantages.tolist() == [2.0, 2.0]
    assert second.turn_index.tolist() == [2, 2]


def test_a_false_extends_flag_is_found_by_comparing_tokens():
    trajectory = make_trajectory(
        make_turn(0, [1, 2], [10]), make_turn(1, [1, 2, 99, 20], [11], extends=True)
    )
    with pytest.raises(
        ContractError, match=r"g0\.0\.a0 turn 1: extends_previous .* prompt of 4 .* the 3 tokens"
    ):
        build_sequences([make_scored(trajectory)])
    with pytest.raises(ContractError, match="turn 1"):
        build_privileged_sequences(trajectory, {0: np.array([9])})


def test_turns_that_sampled_nothing_leave_no_trace_but_their_prompt():
    """An empty response inside a conversation keeps its delta; a sequence without any sampled token
    is dropped.
    """
    trajectory = make_trajectory(
        make_turn(0, [1], []),
        make_turn(1, [1, 20], [10], extends=True),
        make_turn(2, [5], []),
        make_turn(3, [6], [11]),
    )
    first, second = build_sequences([make_scored(trajectory)])
    assert (first.token_ids.tolist(), first.turn_index.tolist()) == ([1, 20, 10], [1])
    assert (second.token_ids.tolist(), second.turn_index.tolist()) == ([6, 11], [3])
    assert build_sequences([make_scored(make_trajectory(make_turn(0, [1], [])))]) == []


def test_empty_prompts_mixed_scores_and_wrong_advantages_are_refused():
    with pytest.raises(ContractError, match="empty prompt"):
        build_sequences([make_scored(make_trajectory(make_turn(0, [], [10])))])
    trajectory = make_trajectory(make_turn(0, [1], [10]))
    with pytest.raises(ContractError, match="Score all or none"):
        build_sequences([make_scored(trajectory), make_scored(trajectory, [[-1.0]])])
    with pytest.raises(ContractError, match="2 advantages for 1 turns"):
        build_sequences([make_scored(trajectory)], [np.zeros(2)])


def test_privileged_sequences_change_fresh_prompts_and_keep_deltas_and_responses():
    """token_ids     90 91 92 93 10 11 20 21 12 | 95 13 14      deltas 20 21 as the student saw them
    response_mask .  .  .  .  1  1  .  .  1     | .  1  1
    """
    first, second = build_privileged_sequences(
        two_turns_then_fresh(),
        {0: np.array([90, 91, 92, 93]), 2: np.array([95])},
        trajectory_index=7,
    )
    assert first.token_ids.tolist() == [90, 91, 92, 93, 10, 11, 20, 21, 12]
    assert first.response_mask.tolist() == [False] * 4 + [True, True, False, False, True]
    assert second.token_ids.tolist() == [95, 13, 14]
    assert (first.turn_index.tolist(), second.turn_index.tolist()) == ([0, 0, 1], [2, 2])
    assert first.trajectory_index == second.trajectory_index == 7


@pytest.mark.parametrize("turns", [[0], [0, 1, 2]])
def test_privileged_prompts_are_for_fresh_turns_exactly(turns):
    with pytest.raises(ContractError, match=r"the turns that begin a sequence are \[0, 2\]"):
        build_privileged_sequences(two_turns_then_fresh(), {turn: np.array([9]) for turn in turns})


def test_microbatch_layout():
    """Budget 8 holds both sequences of length 4 and 3 (2 x 4), right-padded with 0:

    input_ids  1 2 10 11     mask  . . 1 1
               3 12 13 0           . 1 1 .
    """
    short, long = (
        make_trajectory(make_turn(0, [3], [12, 13])),
        make_trajectory(make_turn(0, [1, 2], [10, 11])),
    )
    items = [make_scored(short, [[-1.0, -2.0]]), make_scored(long, [[-3.0, -4.0]])]
    [[batch]] = build_microbatches(
        build_sequences(items, [np.array([0.5]), np.array([-0.5])]), token_budget=8
    )
    assert batch.input_ids.tolist() == [[1, 2, 10, 11], [3, 12, 13, 0]]
    assert batch.response_mask.tolist() == [[False, False, True, True], [False, True, True, False]]
    assert batch.input_ids[batch.response_mask].tolist() == [10, 11, 12, 13]
    assert batch.teacher_logprobs.tolist() == [-3.0, -4.0, -1.0, -2.0]
    assert batch.advantages.tolist() == [-0.5, -0.5, 0.5, 0.5]
    assert batch.trajectory_index.tolist() == [1, 1, 0, 0]
    assert batch.max_rank_tokens == 4


def test_a_sequence_over_the_budget_trains_alone():
    [batches] = build_microbatches(with_lengths(3, 50, 4), token_budget=8)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(1, 50), (2, 4)]


def test_one_sequence_on_two_ranks_leaves_the_other_an_empty_batch_in_step():
    [[full], [empty]] = build_microbatches(with_lengths(5), token_budget=8, num_ranks=2)
    assert full.num_response_tokens == 4
    assert (empty.num_response_tokens, tuple(empty.input_ids.shape), empty.max_rank_tokens) == (
        0,
        (1, 1),
        4,
    )
    assert not empty.response_mask.any()


def test_a_lone_microbatch_is_halved_over_the_ranks():
    ranks = build_microbatches(with_lengths(4, 4, 4, 4), token_budget=100, num_ranks=2)
    assert [[tuple(batch.input_ids.shape) for batch in rank] for rank in ranks] == [
        [(2, 4)],
        [(2, 4)],
    ]


def test_no_sequences_make_no_microbatches():
    assert build_microbatches([], token_budget=8, num_ranks=2) == [[], []]


def test_moving_keeps_every_field():
    [[batch]] = build_microbatches(with_lengths(5), token_budget=8)
    moved = batch.to("cpu")
    assert moved.teacher_logprobs is None
    assert torch.equal(moved.input_ids, batch.input_ids)
    assert moved.max_rank_tokens == batch.max_rank_tokens


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 8), st.integers(1, 60), st.integers(1, 4))
def test_packing_loses_and_doubles_nothing_and_keeps_the_budget(
    seed, num_trajectories, token_budget, num_ranks
):
    items, advantages = make_random_batch(np.random.default_rng(seed), num_trajectories)
    sequences = build_sequences(items, advantages)
    ranks = build_microbatches(sequences, token_budget, num_ranks)
    assert len({len(batches) for batches in ranks}) == 1
    flat = [batch for batches in ranks for batch in batches]
    assert sum(batch.num_response_tokens for batch in flat) == count_response_tokens(sequences)
    assert all(b.input_ids.numel() <= token_budget or len(b.input_ids) == 1 for b in flat)
    assert all(
        len({batches[i].max_rank_tokens for batches in ranks}) == 1 for i in range(len(ranks[0]))
    )
    for field, want in (
        (
            "behavior_logprobs",
            [turn.behavior_logprobs for item in items for turn in item.trajectory.turns],
        ),
        ("teacher_logprobs", [values for item in items for values in item.score.turn_logprobs]),
    ):
        values = [getattr(batch, field).numpy() for batch in flat]
        got = split_by_turn(flat, values, [len(item.trajectory.turns) for item in items])
        assert [x.tolist() for turns in got for x in turns] == [x.tolist() for x in want]
    sampled = split_by_turn(
        flat, [b.input_ids[b.response_mask].numpy() for b in flat], [len(a) for a in advantages]
    )
    tokens = [turn.response_token_ids.tolist() for item in items for turn in item.trajectory.turns]
    assert [x.tolist() for turns in sampled for x in turns] == tokens


def test_splitting_refuses_values_of_another_length():
    [[batch]] = build_microbatches(with_lengths(5), token_budget=8)
    with pytest.raises(ContractError, match="3 values for 4 sampled tokens"):
        split_by_turn([batch], [np.zeros(3)], [1])
