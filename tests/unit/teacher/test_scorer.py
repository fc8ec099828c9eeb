from __future__ import annotations

import asyncio
import dataclasses
import time

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from sdar.contracts.errors import ContractError, CorruptionError, WeightsUnavailableError
from sdar.contracts.types import SamplingParameters
from sdar.model.causal_lm import export_tensors, load_causal_lm
from services.teacher.context import ContextBuilder
from services.teacher.retrieval import Retriever
from services.teacher.scorer import TransformersScorer
from tests.unit.teacher.builders import LIBRARY, MemoryWeights, make_manifest, plain_context, play


@pytest.fixture
def builder(chat):
    return ContextBuilder(chat, Retriever(LIBRARY, kind="task_type", num_skills=3), 1000)


@pytest.fixture
async def scorer(model_directory):
    scorer = make_scorer(model_directory)
    yield scorer
    await scorer.stop()


def make_scorer(model_directory, weights=None, batch_tokens=600):
    model = load_causal_lm(model_directory, "float32")
    return TransformersScorer(
        model, MemoryWeights(weights or {}), batch_tokens=batch_tokens, chunk_tokens=7
    )


def score_independently(model, context, temperature=1.0):
    """One plain forward of transformers per turn on the whole prompt: no shared code."""
    turns = context.trajectory.turns
    expected = []
    offset = 0
    for turn in turns:
        if turn.turn_index in context.fresh_prompts:
            prompt = context.fresh_prompts[turn.turn_index]
            offset = len(prompt) - len(turn.prompt_token_ids)
            opening = prompt
        else:
            opening = np.concatenate([opening, turn.prompt_token_ids[len(opening) - offset :]])
        ids = np.concatenate([opening, turn.response_token_ids]).astype(np.int64)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double() / temperature
        logprobs = torch.log_softmax(logits, -1)
        expected.append([float(logprobs[t - 1, ids[t]]) for t in range(len(opening), len(ids))])
        opening = ids.astype(np.int32)
    return expected


def assert_close(scores, expected, tolerance=2e-5):
    should_be = [len(values) for values in expected]
    assert [len(values) for values in scores] == should_be
    for values, wanted in zip(scores, expected, strict=True):
        np.testing.assert_allclose(values, wanted, atol=tolerance, rtol=0)


async def test_scores_equal_an_independent_forward_of_transformers(
    scorer, builder, chat, model_directory
):
    """Long, short, merged, windowed, hot and cold in one batch, against a forward per turn."""
    model = Qwen2ForCausalLM.from_pretrained(model_directory).eval()
    trajectories = [
        play(chat, num_turns=1, seed=1),
        play(chat, num_turns=4, seed=2),
        play(chat, num_turns=3, seed=3, is_windowed=True),
        play(chat, num_turns=2, seed=4, temperature=0.7),
    ]
    contexts = [builder.build(trajectory) for trajectory in trajectories]
    scores = await scorer.score(contexts)
    for context, values in zip(contexts, scores, strict=True):
        temperature = context.trajectory.sampling.temperature
        assert_close(values, score_independently(model, context, temperature))


async def test_the_privileged_context_changes_the_scores_and_not_the_tokens(scorer, builder, chat):
    trajectory = play(chat)
    privileged, plain = await scorer.score(
        [builder.build(trajectory), plain_context(trajectory, chat)]
    )
    sampled = [len(turn.response_token_ids) for turn in trajectory.turns]
    assert list(map(len, privileged)) == sampled
    assert list(map(len, plain)) == sampled
    assert np.abs(np.concatenate(privileged) - np.concatenate(plain)).max() > 0.01


async def test_a_turn_in_which_nothing_was_sampled_has_no_scores(scorer, builder, chat):
    trajectory = play(chat, num_turns=1)
    empty = dataclasses.replace(
        trajectory.turns[0], response_token_ids=[], behavior_logprobs=[], policy_versions=[]
    )
    silent = dataclasses.replace(trajectory, turns=(empty,))
    scores = await scorer.score([builder.build(silent), builder.build(trajectory)])
    assert [len(turns[0]) for turns in scores] == [0, len(trajectory.turns[0].response_token_ids)]


async def test_new_weights_score_as_that_version(builder, chat, model_directory):
    other = Qwen2ForCausalLM.from_pretrained(model_directory).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    scorer = make_scorer(model_directory, {3: export_tensors(other)})
    context = builder.build(play(chat))
    assert scorer.teacher_version == 0
    await scorer.update_weights(make_manifest(3))
    assert scorer.teacher_version == 3
    (scores,) = await scorer.score([context])
    assert_close(scores, score_independently(other, context), tolerance=5e-5)
    await scorer.stop()


@pytest.mark.parametrize(("version", "error"), [(1, CorruptionError), (2, WeightsUnavailableError)])
async def test_weights_that_cannot_be_used_leave_the_old_ones(
    builder, chat, model_directory, version, error
):
    scorer = make_scorer(model_directory, {1: {"model.norm.weight": torch.ones(1)}})
    context = builder.build(play(chat))
    before = await scorer.score([context])
    with pytest.raises(error):
        await scorer.update_weights(make_manifest(version))
    assert scorer.teacher_version == 0
    np.testing.assert_array_equal(
        np.concatenate((await scorer.score([context]))[0]), np.concatenate(before[0])
    )
    await scorer.stop()


@pytest.mark.parametrize(
    "sampling", [SamplingParameters(0.0, 1.0, 8), SamplingParameters(1.0, 0.9, 8)]
)
def test_tokens_that_have_no_full_distribution_are_refused(scorer, builder, chat, sampling):
    context = builder.build(dataclasses.replace(play(chat), sampling=sampling))
    with pytest.raises(ContractError, match="no log-probs to compare with"):
        scorer.check(context)


def test_tokens_the_model_does_not_know_are_refused(scorer, builder, chat):
    trajectory = play(chat, num_turns=1)
    turn = dataclasses.replace(
        trajectory.turns[0],
        response_token_ids=[10_000] * len(trajectory.turns[0].response_token_ids),
    )
    with pytest.raises(ContractError, match="token ids up to 10000"):
        scorer.check(builder.build(dataclasses.replace(trajectory, turns=(turn,))))


async def test_the_event_loop_answers_while_torch_works(scorer, builder, chat):
    contexts = [builder.build(play(chat, num_turns=4, seed=seed)) for seed in range(64)]
    scoring = asyncio.create_task(scorer.score(contexts))
    num_turns_of_the_loop, started_at = 0, time.monotonic()
    while not scoring.done():
        await asyncio.sleep(0)
        num_turns_of_the_loop += 1
        assert time.monotonic() - started_at < 30
    assert num_turns_of_the_loop > 2
