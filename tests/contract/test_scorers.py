"""What every `Scorer` promises, and how far the two engines are apart (vLLM starts once)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from sdar.contracts.errors import ContractError, CorruptionError
from sdar.engines.vllm_weights import vllm_environment
from sdar.model.causal_lm import export_tensors, load_causal_lm
from sdar.model.chat import ChatTokenizer, compute_model_identity
from sdar.process.settings import apply_environment
from sdar.weights.store import WeightStore
from services.teacher.context import ContextBuilder
from services.teacher.retrieval import Retriever
from services.teacher.scorer import TransformersScorer
from services.teacher.vllm_scorer import VllmScorer
from tests.unit.teacher.builders import LIBRARY, RUN_ID, make_model_directory, play

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE = 1e-4
"""Nats, float32: what the two engines, and each and plain transformers, may differ by."""


@dataclasses.dataclass
class Bench:
    """Both scorers over one model and one weight store."""

    scorers: dict
    store: WeightStore
    model: Qwen2ForCausalLM
    contexts: list
    manifests: dict


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return make_model_directory(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
async def bench(model_directory, tmp_path_factory):
    apply_environment(vllm_environment(1))
    chat = ChatTokenizer(model_directory)
    builder = ContextBuilder(chat, Retriever(LIBRARY, kind="task_type", num_skills=3), 500)
    url = str(tmp_path_factory.mktemp("weights"))
    store = WeightStore(url, RUN_ID)
    base = load_causal_lm(model_directory, "float32")
    vllm = VllmScorer(
        model_directory,
        dtype="float32",
        max_sequence_tokens=500,
        batch_tokens=512,
        weight_store_url=url,
        run_id=RUN_ID,
        kv_cache_gib=0.1,
    )
    scorers = {
        "transformers": TransformersScorer(base, store, batch_tokens=600, chunk_tokens=16),
        "vllm": vllm,
    }
    model = Qwen2ForCausalLM.from_pretrained(model_directory).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    identity = compute_model_identity(model_directory)
    manifests = {1: store.publish(1, export_tensors(model), identity)}
    contexts = [
        builder.build(play(chat, num_turns=1 + seed % 4, seed=seed, is_windowed=seed % 3 == 0))
        for seed in range(12)
    ]
    for scorer in scorers.values():
        await scorer.start()
    yield Bench(scorers, store, model, contexts, manifests)
    for scorer in scorers.values():
        await scorer.stop()
        await scorer.stop()


@pytest.fixture(params=["transformers", "vllm"])
def scorer(bench, request):
    return bench.scorers[request.param]


def flat(scores):
    return np.concatenate([values for turns in scores for values in turns])


async def test_it_starts_as_version_zero(scorer):
    assert scorer.teacher_version == 0


async def test_it_returns_one_value_for_each_sampled_token_and_none_for_others(bench, scorer):
    scores = await scorer.score(bench.contexts)
    for context, turns in zip(bench.contexts, scores, strict=True):
        expected = [len(turn.response_token_ids) for turn in context.trajectory.turns]
        assert [len(values) for values in turns] == expected
    assert (flat(scores) < 0).all()
    assert flat(scores).dtype == np.float32


async def test_scoring_nothing_is_nothing(scorer):
    assert await scorer.score([]) == []


async def test_company_does_not_change_a_score(bench, scorer):
    together = await scorer.score(bench.contexts)
    alone = [turns for context in bench.contexts for turns in await scorer.score([context])]
    np.testing.assert_allclose(flat(together), flat(alone), atol=TOLERANCE, rtol=0)


async def test_greedy_episodes_are_refused(bench, scorer):
    context = bench.contexts[0]
    sampling = dataclasses.replace(context.trajectory.sampling, temperature=0.0)
    trajectory = dataclasses.replace(context.trajectory, sampling=sampling)
    with pytest.raises(ContractError, match="no log-probs to compare with"):
        scorer.check(dataclasses.replace(context, trajectory=trajectory))


async def test_vllm_refuses_a_temperature_it_cannot_apply(bench):
    context = bench.contexts[0]
    sampling = dataclasses.replace(context.trajectory.sampling, temperature=0.7)
    tempered = dataclasses.replace(
        context, trajectory=dataclasses.replace(context.trajectory, sampling=sampling)
    )
    bench.scorers["transformers"].check(tempered)
    with pytest.raises(
        ContractError, match=r"temperature 0\.7; vLLM's prompt log-probs are those of temperature 1"
    ):
        bench.scorers["vllm"].check(tempered)


async def test_the_two_engines_agree(bench, record_property):
    ours, theirs = [
        flat(await bench.scorers[name].score(bench.contexts)) for name in ("transformers", "vllm")
    ]
    difference = np.abs(ours - theirs)
    record_property("scorer_difference_nats_max", float(difference.max()))
    assert len(ours) > 100
    assert difference.max() < TOLERANCE


async def test_weights_of_another_model_are_refused_and_the_old_ones_stay(bench, scorer):
    before = flat(await scorer.score(bench.contexts))
    manifest = bench.manifests[1]
    foreign = dataclasses.replace(manifest, policy_version=9, tensors=manifest.tensors[:-1])
    with pytest.raises(CorruptionError):
        await scorer.update_weights(foreign)
    assert scorer.teacher_version == 0
    np.testing.assert_allclose(
        flat(await scorer.score(bench.contexts)), before, atol=TOLERANCE, rtol=0
    )


async def test_published_weights_score_as_transformers_does_with_them(bench, scorer):
    """Last: it leaves version 1 in place."""
    await scorer.update_weights(bench.manifests[1])
    assert scorer.teacher_version == 1
    scores = await scorer.score(bench.contexts)
    for context, turns in zip(bench.contexts, scores, strict=True):
        for sequence in context.build_sequences(0):
            with torch.no_grad():
                logits = bench.model(torch.from_numpy(sequence.token_ids)[None]).logits[0].double()
            positions = np.flatnonzero(sequence.response_mask)
            wanted = torch.log_softmax(logits, -1)[positions - 1, sequence.token_ids[positions]]
            got = np.concatenate([turns[index] for index in np.unique(sequence.turn_index)])
            np.testing.assert_allclose(got, wanted.numpy(), atol=TOLERANCE, rtol=0)
