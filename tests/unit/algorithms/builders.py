"""Small trajectories and a small model, spelled out by their tokens."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sdar.algorithms.corrections import compute_off_policy_weights
from sdar.algorithms.inputs import TokenInputs
from sdar.contracts.types import (
    EnvironmentIdentity,
    EpisodeEnd,
    ModelIdentity,
    Purpose,
    SamplingParameters,
    ScoredTrajectory,
    StopReason,
    Task,
    TeacherScore,
    Trajectory,
    Turn,
)

VOCABULARY = 37


def make_turn(
    index, prompt, response, *, extends=False, reward=0.0, valid=True, logprobs=None, versions=None
):
    return Turn(
        turn_index=index,
        prompt_token_ids=prompt,
        messages=(),
        extends_previous=extends,
        response_token_ids=response,
        behavior_logprobs=[-1.0] * len(response) if logprobs is None else logprobs,
        policy_versions=[0] * len(response) if versions is None else versions,
        response_text="",
        stop_reason=StopReason.END_OF_TURN,
        action="",
        is_action_valid=valid,
        reward=reward,
    )


def make_trajectory(*turns, index=0, group_size=8):
    return Trajectory(
        run_id="run",
        group_id="g0",
        trajectory_id=f"g0.{index}.a0",
        attempt=0,
        episode_index=index,
        group_size=group_size,
        task=Task("household", "train", "t0", "heat", "heat the egg", 0),
        purpose=Purpose.TRAIN,
        environment=EnvironmentIdentity("household", "1"),
        model=ModelIdentity("tiny", "f"),
        sampling=SamplingParameters(1.0, 1.0, 8),
        turns=turns,
        end=EpisodeEnd.TERMINATED,
        is_success=True,
    )


def make_scored(trajectory, logprobs=None):
    """`logprobs` per turn; None leaves the trajectory without a score."""
    if logprobs is None:
        return ScoredTrajectory(trajectory, None)
    score = TeacherScore(
        trajectory.trajectory_id,
        0,
        tuple(np.array(x) for x in logprobs),
        (),
        0,
        "",
        "",
        "task_type",
        "x",
    )
    return ScoredTrajectory(trajectory, score)


def make_random_batch(rng, num_trajectories, with_teacher=True):
    """Trajectories of 1-4 turns, some continuing and some fresh, with 0-5 sampled tokens each; and
    advantages per turn.
    """
    items, advantages = [], []
    for index in range(num_trajectories):
        turns, context = [], []
        for turn_index in range(rng.integers(1, 5)):
            extends = bool(turn_index and rng.random() < 0.6)
            added = rng.integers(1, VOCABULARY, rng.integers(1, 6)).tolist()
            prompt = context + added if extends else added
            response = rng.integers(1, VOCABULARY, rng.integers(0, 6)).tolist()
            logprobs = -rng.exponential(2.0, len(response))
            versions = rng.integers(0, 3, len(response))
            turns.append(
                make_turn(
                    turn_index,
                    prompt,
                    response,
                    extends=extends,
                    logprobs=logprobs,
                    versions=versions,
                )
            )
            context = prompt + response
        trajectory = make_trajectory(*turns, index=index, group_size=num_trajectories)
        teacher = (
            [-rng.exponential(2.0, len(turn.response_token_ids)) for turn in turns]
            if with_teacher
            else None
        )
        items.append(make_scored(trajectory, teacher))
        advantages.append(rng.normal(size=len(turns)))
    return items, advantages


def make_inputs(teacher_gap, **changes):
    """What a term reads of tokens with these gaps: fresh, all scored, advantage 0, entropy 1."""
    gap = torch.as_tensor(teacher_gap)
    logprobs = torch.full_like(gap, -1.0)
    fields = {
        "policy_logprobs": logprobs,
        "entropy": torch.ones_like(gap),
        "behavior_logprobs": logprobs,
        "advantages": torch.zeros_like(gap),
        "ref_logprobs": logprobs,
        "teacher_gap": gap,
        "is_scored": torch.ones_like(gap, dtype=torch.bool),
        "turn_index": torch.zeros_like(gap, dtype=torch.int64),
        "distillation_weight": torch.ones_like(gap),
        "teacher_weight": 1.0,
    } | changes
    fields["off_policy"] = compute_off_policy_weights(
        "decoupled", fields["policy_logprobs"], fields["behavior_logprobs"], None, cap=5.0
    )
    return TokenInputs(**fields)


def make_model(seed=0, dtype=torch.float32, tied=False):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def central_difference(function, x, step=1e-6):
    """Gradient of a scalar function of a float64 vector, one coordinate at a time."""
    gradient = torch.zeros_like(x)
    for i in range(len(x)):
        delta = torch.zeros_like(x)
        delta[i] = step
        gradient[i] = (function(x + delta) - function(x - delta)) / (2 * step)
    return gradient
