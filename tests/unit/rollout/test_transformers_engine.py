"""The in-process sampler against the transformers forward pass on the same weights."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from sdar.contracts.errors import (
    ConfigurationError,
    CorruptionError,
    EngineFailedError,
    InvalidInputError,
    UnavailableError,
)
from sdar.contracts.types import SamplingParameters, StopReason
from sdar.in_process.ragged_decoder import RaggedDecoder
from sdar.in_process.transformers_engine import TransformersEngine
from sdar.model.causal_lm import export_tensors, load_causal_lm
from tests.unit.rollout.fakes import make_manifest, write_model

TEMPERATURE = 0.7
SAMPLING = SamplingParameters(TEMPERATURE, 1.0, 12)


class Store:
    """A weight store that holds the same tensors under every version."""

    def __init__(self, tensors) -> None:
        self.tensors = tensors

    def iter_tensors(self, manifest):
        return iter(self.tensors.items())


def build(path, **options) -> TransformersEngine:
    options = {"dtype": "float32", "max_sequence_tokens": 128, "stop_token_ids": [2]} | options
    return TransformersEngine(path, **options)


@pytest.fixture
async def engine(model_path):
    engine = build(model_path)
    await engine.start()
    yield engine
    await engine.stop()


@torch.inference_mode()
def expected_logprobs(model, prompt, response, temperature=TEMPERATURE) -> np.ndarray:
    """Log-probs [T] of the response tokens by one plain forward pass, no cache."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None].long())[:, 0].numpy()


def prompts_of(*lengths, seed=0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 250, length).tolist() for length in lengths]


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("num_key_values", [1, 2])
async def test_logprobs_of_ragged_turns_equal_the_plain_forward_pass(
    tmp_path, is_tied, num_key_values
):
    path = write_model(tmp_path, is_tied=is_tied, num_key_values=num_key_values)
    model = load_causal_lm(path, "float32")
    engine = build(path)
    await engine.start()
    prompts = prompts_of(1, 5, 17, 17, 40)
    for _ in range(3):
        generations = await asyncio.gather(
            *(engine.generate(prompt, SAMPLING) for prompt in prompts)
        )
        for prompt, generation in zip(prompts, generations, strict=True):
            want = expected_logprobs(model, prompt, generation.response_token_ids.tolist())
            np.testing.assert_allclose(generation.logprobs, want, atol=1e-5)
        prompts = [
            [*prompt, *generation.response_token_ids.tolist(), 7, 8, 9][:100]
            for prompt, generation in zip(prompts, generations, strict=True)
        ]
    await engine.stop()


async def test_a_continued_conversation_computes_only_its_last_stretch(engine):
    (prompt,) = prompts_of(30)
    first = await engine.generate(prompt, SAMPLING)
    again = await engine.generate([*prompt, *first.response_token_ids.tolist(), 5, 6], SAMPLING)
    assert first.num_cached_tokens == 0
    # The last sampled token was never fed, so it is computed with the new ones.
    assert again.num_cached_tokens == 30 + len(first.response_token_ids) - 1


async def test_a_group_with_one_prompt_gets_different_responses_with_exact_logprobs(
    engine, model_path
):
    (prompt,) = prompts_of(12)
    generations = await asyncio.gather(*(engine.generate(prompt, SAMPLING) for _ in range(8)))
    assert len({tuple(generation.response_token_ids) for generation in generations}) > 4
    model = load_causal_lm(model_path, "float32")
    for generation in generations:
        want = expected_logprobs(model, prompt, generation.response_token_ids.tolist())
        np.testing.assert_allclose(generation.logprobs, want, atol=1e-5)


async def test_temperature_zero_takes_the_most_probable_token_with_its_unscaled_logprob(
    engine, model_path
):
    (prompt,) = prompts_of(9)
    generation = await engine.generate(prompt, SamplingParameters(0.0, 1.0, 10))
    model, ids = load_causal_lm(model_path, "float32"), list(prompt)
    for token, logprob in zip(generation.response_token_ids, generation.logprobs, strict=True):
        with torch.inference_mode():
            distribution = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert int(distribution.argmax()) == token
        assert float(distribution.max()) == pytest.approx(float(logprob), abs=1e-5)
        ids.append(int(token))


async def test_sampling_follows_the_distribution(engine, model_path):
    """2000 draws of one token: a chi-square over the tokens expected at least 10 times."""
    (prompt,) = prompts_of(6)
    one = SamplingParameters(1.0, 1.0, 1)
    generations = await asyncio.gather(*(engine.generate(prompt, one) for _ in range(2000)))
    with torch.inference_mode():
        logits = load_causal_lm(model_path, "float32")(torch.tensor([prompt])).logits[0, -1]
    expected = 2000 * logits.softmax(-1).numpy()
    counts = np.bincount(
        [int(generation.response_token_ids[0]) for generation in generations],
        minlength=len(expected),
    )
    common = expected >= 10
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert chi2 < common.sum() + 4 * np.sqrt(2 * common.sum())


async def test_top_p_draws_from_the_renormalised_nucleus(engine, model_path):
    (prompt,) = prompts_of(6)
    nucleus = SamplingParameters(1.0, 0.3, 1)
    generations = await asyncio.gather(*(engine.generate(prompt, nucleus) for _ in range(200)))
    with torch.inference_mode():
        probabilities = (
            load_causal_lm(model_path, "float32")(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        )
    ordered, order = probabilities.sort(descending=True)
    size = int((ordered.cumsum(0) < 0.3).sum()) + 1
    kept = {
        int(token): float(probability / ordered[:size].sum())
        for token, probability in zip(order[:size], ordered, strict=False)
    }
    for generation in generations:
        token, logprob = int(generation.response_token_ids[0]), float(generation.logprobs[0])
        assert kept[token] == pytest.approx(np.exp(logprob), rel=1e-4)


async def test_the_same_seed_gives_the_same_responses(model_path):
    async def sample(seed):
        engine = build(model_path, seed=seed)
        await engine.start()
        generations = await asyncio.gather(
            *(engine.generate(prompt, SAMPLING) for prompt in prompts_of(4, 9, 9))
        )
        await engine.stop()
        return [generation.response_token_ids.tolist() for generation in generations]

    assert await sample(3) == await sample(3) != await sample(4)


async def test_a_response_ends_with_the_stop_token_or_at_its_length(engine):
    sampling = SamplingParameters(2.0, 1.0, 60)
    generating = [engine.generate(prompt, sampling) for prompt in prompts_of(*[5] * 40)]
    generations = await asyncio.gather(*generating)
    reasons = {generation.stop_reason for generation in generations}
    assert reasons == {StopReason.END_OF_TURN, StopReason.LENGTH}
    for generation in generations:
        tokens = generation.response_token_ids.tolist()
        assert 2 not in tokens[:-1]
        assert (tokens[-1] == 2) == (generation.stop_reason is StopReason.END_OF_TURN)
        assert tokens[-1] == 2 or len(tokens) == 60


async def test_responses_stop_at_the_end_of_the_context(engine):
    (prompt,) = prompts_of(120)
    generation = await engine.generate(prompt, SamplingParameters(0.0, 1.0, 60))
    assert len(generation.response_token_ids) <= 8


async def test_new_weights_change_the_version_the_tokens_and_drop_the_cache(tmp_path, model_path):
    other = load_causal_lm(write_model(tmp_path, seed=1), "float32")
    engine = build(model_path, store=Store(export_tensors(other)))
    await engine.start()
    (prompt,) = prompts_of(20)
    before = await engine.generate(prompt, SAMPLING)
    await engine.update_weights(make_manifest(5))
    longer = [*prompt, *before.response_token_ids.tolist()]
    after = await engine.generate(longer, SAMPLING)
    assert set(before.policy_versions) == {0}
    assert set(after.policy_versions) == {5}
    found = (engine.policy_version, engine.stats.num_weight_updates, after.num_cached_tokens)
    assert found == (5, 1, 0)
    np.testing.assert_allclose(
        after.logprobs,
        expected_logprobs(other, longer, after.response_token_ids.tolist()),
        atol=1e-5,
    )
    await engine.stop()


async def test_weights_of_another_model_are_refused_and_the_old_ones_still_serve(
    engine, model_path
):
    tensors = export_tensors(load_causal_lm(model_path, "float32"))
    tensors.pop("model.norm.weight")
    with pytest.raises(CorruptionError, match="missing"):
        engine.install(1, tensors)
    assert engine.policy_version == 0
    await engine.generate([5], SAMPLING)


async def test_training_the_model_in_place_does_not_change_what_is_sampled(model_path):
    model = load_causal_lm(model_path, "float32")
    decoder = RaggedDecoder(model, 64)

    def logits():
        return decoder.compute_logits(decoder.prefill([[5, 6, 7]], [0], decoder.allocate(1, 8)))

    with torch.inference_mode():
        before = logits()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    with torch.inference_mode():
        assert torch.equal(logits(), before)
        decoder.refresh()
        assert not torch.equal(logits(), before)


@pytest.mark.parametrize(
    ("prompt", "sampling", "match"),
    [
        ([], SAMPLING, "0 tokens"),
        ([5] * 128, SAMPLING, "128 tokens"),
        ([320], SAMPLING, "token ids outside"),
        ([-1], SAMPLING, "token ids outside"),
        ([5], SamplingParameters(-0.1, 1.0, 4), "temperature"),
        ([5], SamplingParameters(1.0, 0.0, 4), "top_p"),
        ([5], SamplingParameters(1.0, 1.0, 0), "max_response_tokens"),
    ],
)
async def test_a_bad_request_is_refused_before_it_reaches_the_others(
    engine, prompt, sampling, match
):
    with pytest.raises(InvalidInputError, match=match):
        await engine.generate(prompt, sampling)


async def test_a_cancelled_call_leaves_the_rest_of_its_wave_alone(engine):
    calls = [asyncio.create_task(engine.generate(prompt, SAMPLING)) for prompt in prompts_of(5, 6)]
    await asyncio.sleep(0)
    calls[0].cancel()
    assert (await calls[1]).response_token_ids.size
    with pytest.raises(asyncio.CancelledError):
        await calls[0]


async def test_stopping_ends_what_waits_and_refuses_what_comes(model_path):
    engine = build(model_path)
    with pytest.raises(UnavailableError, match="not running"):
        await engine.generate([5], SAMPLING)
    await engine.start()
    waiting = asyncio.create_task(engine.generate([5], SAMPLING))
    await asyncio.sleep(0)
    await engine.stop()
    await engine.stop()
    assert not engine.is_alive
    with pytest.raises(UnavailableError):
        await waiting


async def test_an_engine_that_dies_fails_its_callers_and_says_so(engine):
    engine._decoder = None
    with pytest.raises(EngineFailedError, match="died"):
        await engine.generate([5], SAMPLING)
    assert not engine.is_alive
    with pytest.raises(EngineFailedError, match="Restart"):
        await engine.generate([5], SAMPLING)


def test_an_architecture_that_would_be_computed_wrongly_is_refused(model_path):
    model = load_causal_lm(model_path, "float32")
    model.config.model_type = "llama"
    with pytest.raises(ConfigurationError, match="vLLM"):
        RaggedDecoder(model, 64)
