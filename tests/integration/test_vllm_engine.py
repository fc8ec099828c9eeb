"""The sampler on real vLLM against transformers. One engine for the module: a start takes 15 s.

Every policy version is a perturbation of one tiny random model, far enough from the others (more
than 0.5 nats on average) that a token stamped with the wrong version cannot pass.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch

from sdar.config import LEAST_TEMPERATURE
from sdar.contracts.errors import (
    CorruptionError,
    EngineFailedError,
    InvalidInputError,
    UnavailableError,
    WeightsUnavailableError,
)
from sdar.contracts.types import ModelIdentity, SamplingParameters, StopReason, WeightsManifest
from sdar.engines.vllm_weights import vllm_environment
from sdar.model.causal_lm import export_tensors, install_tensors
from sdar.process.settings import apply_environment
from sdar.weights.store import WeightStore
from services.rollout.engine import Generation, VllmEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

STOP_TOKEN = 7
VOCABULARY_SIZE = 256
TOLERANCE = 1e-4
"""In nats, per token: float32 in two implementations differs by 2e-5."""
WARM = SamplingParameters(temperature=1.0, top_p=1.0, max_response_tokens=200)


class Policies:
    """The published versions, and the reference that scores tokens under each."""

    def __init__(self, directory: Path) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
        torch.manual_seed(0)
        self.causal_lm = Qwen2ForCausalLM(config).eval()
        self.base_path = directory / "base"
        self.causal_lm.save_pretrained(self.base_path)
        self.store_path = directory / "weights"
        self.store = WeightStore(self.store_path.as_uri(), "run")
        self.tensors = {
            0: {name: value.clone() for name, value in export_tensors(self.causal_lm).items()}
        }

    def publish(self, change: dict[str, torch.Tensor] | None = None) -> WeightsManifest:
        """Publish the next version: a perturbed base, with `change` on top."""
        version = len(self.tensors)
        generator = torch.Generator().manual_seed(version)
        tensors = {
            name: value + 0.05 * torch.randn(value.shape, generator=generator)
            for name, value in self.tensors[0].items()
        }
        self.tensors[version] = tensors
        return self.store.publish(
            version, tensors | (change or {}), ModelIdentity("tiny", "fingerprint")
        )

    def publish_bfloat16(self) -> WeightsManifest:
        """Publish the next bfloat16 version, every fiftieth weight changed; a delta if possible."""
        version = len(self.tensors)
        tensors = {
            name: value.to(torch.bfloat16, copy=True)
            for name, value in self.tensors[version - 1].items()
        }
        for tensor in tensors.values():
            tensor.view(-1)[version % 50 :: 50] += 0.3
        self.tensors[version] = tensors
        return self.store.publish(version, tensors, ModelIdentity("tiny", "fingerprint"))

    def locate_shard(self, manifest: WeightsManifest) -> Path:
        return self.store_path / manifest.path / manifest.tensors[0].shard

    @torch.no_grad()
    def compute_logprobs(
        self, version: int, prompt: list[int], response: np.ndarray, temperature: float
    ) -> np.ndarray:
        """Reference log-prob of each response token under a version; float32 [T]."""
        install_tensors(self.causal_lm, self.tensors[version].items())
        logits = self.causal_lm(torch.tensor([[*prompt, *response.tolist()]])).logits[
            0, len(prompt) - 1 : -1
        ]
        logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        return logprobs.gather(1, torch.from_numpy(response).long()[:, None])[:, 0].numpy()

    def measure_error(
        self, prompt: list[int], generation: Generation, temperature: float = 1.0
    ) -> float:
        """Largest difference from the reference, each token under its own version."""
        error = 0.0
        for version in set(generation.policy_versions.tolist()):
            reference = self.compute_logprobs(
                version, prompt, generation.response_token_ids, temperature
            )
            mine = generation.policy_versions == version
            error = max(error, float(np.abs(reference - generation.logprobs)[mine].max()))
        return error


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"))


def build_engine(policies: Policies) -> VllmEngine:
    apply_environment(vllm_environment(1))
    return VllmEngine(
        policies.base_path,
        dtype="float32",
        max_model_len=384,
        max_num_seqs=32,
        stop_token_ids=[STOP_TOKEN],
        weight_store_url=policies.store_path.as_uri(),
        run_id="run",
        kv_cache_gib=0.05,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(policies: Policies) -> AsyncIterator[VllmEngine]:
    engine = build_engine(policies)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
def prompts() -> Any:
    """An endless supply of prompts of 100 tokens, none twice."""
    generator = np.random.default_rng(time.time_ns())
    return (
        generator.integers(STOP_TOKEN + 1, VOCABULARY_SIZE, 100).tolist() for _ in itertools.count()
    )


async def test_base_weights_are_version_0(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    prompt = next(prompts)
    generation = await engine.generate(prompt, WARM)
    assert engine.policy_version == 0
    assert set(generation.policy_versions.tolist()) == {0}
    assert policies.measure_error(prompt, generation) < TOLERANCE


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
async def test_logprobs_are_of_the_tempered_distribution(
    engine: VllmEngine, policies: Policies, prompts: Any, temperature: float
) -> None:
    prompt = next(prompts)
    generation = await engine.generate(prompt, dataclasses.replace(WARM, temperature=temperature))
    assert policies.measure_error(prompt, generation, temperature) < TOLERANCE


async def test_the_least_temperature_of_a_run_is_the_least_that_vllm_keeps() -> None:
    from vllm import SamplingParams

    assert SamplingParams(temperature=LEAST_TEMPERATURE).temperature == LEAST_TEMPERATURE
    below = 0.99 * LEAST_TEMPERATURE
    assert SamplingParams(temperature=below).temperature > below


async def test_greedy_tokens_carry_the_unscaled_logprob_beside_sampled_ones(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    """One batch of both kinds: vLLM takes another path when all rows are greedy."""
    greedy = dataclasses.replace(WARM, temperature=0.0, max_response_tokens=20)
    first, second = next(prompts), next(prompts)
    alone = await engine.generate(first, greedy)
    beside, sampled = await asyncio.gather(
        engine.generate(first, greedy), engine.generate(second, WARM)
    )
    assert beside.response_token_ids.tolist() == alone.response_token_ids.tolist()
    for prompt, generation in ((first, alone), (first, beside), (second, sampled)):
        assert policies.measure_error(prompt, generation) < TOLERANCE


async def test_top_p_renormalises_over_the_tokens_it_keeps(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    prompt = next(prompts)
    generation = await engine.generate(prompt, dataclasses.replace(WARM, top_p=0.5))
    unfiltered = policies.compute_logprobs(0, prompt, generation.response_token_ids, 1.0)
    gain = generation.logprobs - unfiltered
    assert np.isfinite(generation.logprobs).all()
    assert gain.min() > -TOLERANCE
    assert gain.max() < np.log(1 / 0.5) + TOLERANCE
    assert gain.mean() > 0.1


async def test_response_ends_with_the_stop_token_and_its_logprob(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    sampling = dataclasses.replace(WARM, temperature=2.0)
    pairs = [
        (prompt, engine.generate(prompt, sampling)) for prompt in itertools.islice(prompts, 32)
    ]
    reasons = set()
    prompts, generating = zip(*pairs, strict=True)
    for prompt, generation in zip(prompts, await asyncio.gather(*generating), strict=True):
        response = generation.response_token_ids.tolist()
        has_ended = generation.stop_reason is StopReason.END_OF_TURN
        reasons.add(generation.stop_reason)
        assert len(response) == len(generation.logprobs) == len(generation.policy_versions)
        assert (response[-1] == STOP_TOKEN) == has_ended
        assert STOP_TOKEN not in response[:-1]
        assert has_ended or len(response) == sampling.max_response_tokens
        assert policies.measure_error(prompt, generation, 2.0) < TOLERANCE
    assert reasons == set(StopReason)


async def test_response_is_cut_where_the_context_ends(engine: VllmEngine, prompts: Any) -> None:
    prompt = next(prompts) * 3 + [9] * 80
    generation = await engine.generate(prompt, dataclasses.replace(WARM, temperature=0.0))
    assert len(generation.response_token_ids) <= 4


async def test_a_continued_conversation_is_served_from_the_prefix_cache(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    prompt = next(prompts)
    first = await engine.generate(prompt, WARM)
    again = await engine.generate(prompt, WARM)
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens == 96  # whole blocks of 32
    assert policies.measure_error(prompt, again) < TOLERANCE


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        ([], WARM),
        ([9] * 384, WARM),
        ([9, VOCABULARY_SIZE], WARM),
        ([9, -1], WARM),
        ([9], dataclasses.replace(WARM, temperature=-1.0)),
        ([9], dataclasses.replace(WARM, temperature=2.5)),
        ([9], dataclasses.replace(WARM, top_p=0.0)),
        ([9], dataclasses.replace(WARM, max_response_tokens=0)),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_and_harms_nobody(
    engine: VllmEngine, prompt: list[int], sampling: SamplingParameters
) -> None:
    with pytest.raises(InvalidInputError):
        await engine.generate(prompt, sampling)
    assert engine.is_alive
    assert engine.stats.num_running_requests == 0


async def test_every_token_is_of_the_version_it_is_stamped_with(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    """Requests in flight across three updates while a held event loop reads outputs late."""
    versions = [policies.publish() for _ in range(3)]
    finished: list[tuple[list[int], float, Generation]] = []
    is_over = asyncio.Event()

    async def keep_generating(temperature: float) -> None:
        while not is_over.is_set():
            prompt = next(prompts)
            finished.append(
                (
                    prompt,
                    temperature,
                    await engine.generate(
                        prompt, dataclasses.replace(WARM, temperature=temperature)
                    ),
                )
            )

    async def hold_the_loop() -> None:
        while not is_over.is_set():
            time.sleep(0.03)  # noqa: ASYNC251  blocking is the point
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for temperature in [1.0, 0.7, 0.0] * 4:
            tasks.create_task(keep_generating(temperature))
        tasks.create_task(hold_the_loop())
        for manifest in versions:
            await engine.update_weights(manifest)
            assert engine.policy_version == manifest.policy_version
        is_over.set()

    crossing = [
        generation
        for _, _, generation in finished
        if len(set(generation.policy_versions.tolist())) > 1
    ]
    assert len(crossing) >= 3
    for prompt, temperature, generation in finished:
        assert (np.diff(generation.policy_versions) >= 0).all()
        assert policies.measure_error(prompt, generation, temperature) < TOLERANCE


async def test_versions_are_told_apart_by_the_reference(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    """Without this, agreement would prove nothing."""
    prompt = next(prompts)
    generation = await engine.generate(prompt, WARM)
    other = policies.compute_logprobs(
        engine.policy_version - 1, prompt, generation.response_token_ids, 1.0
    )
    assert np.abs(other - generation.logprobs).mean() > 0.5


async def test_an_update_empties_the_prefix_cache(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    prompt = next(prompts)
    await engine.generate(prompt, WARM)
    await engine.update_weights(policies.publish())
    generation = await engine.generate(prompt, WARM)
    assert generation.num_cached_tokens == 0
    assert policies.measure_error(prompt, generation) < TOLERANCE


async def test_an_older_version_can_be_served_again(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    """Evaluation is pinned to one version while newer ones appear."""
    older, newer = policies.publish(), policies.publish()
    prompt = next(prompts)
    for manifest in (newer, older, newer):
        await engine.update_weights(manifest)
        generation = await engine.generate(prompt, WARM)
        assert set(generation.policy_versions.tolist()) == {manifest.policy_version}
        assert policies.measure_error(prompt, generation) < TOLERANCE


async def test_a_bad_publication_leaves_the_previous_weights_serving(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    version, num_updates = engine.policy_version, engine.stats.num_weight_updates
    corrupt = policies.publish()
    lost = policies.publish()
    partial = policies.publish()
    shard = policies.locate_shard(corrupt)
    *intact, last = shard.read_bytes()
    shard.write_bytes(bytes([*intact, last ^ 1]))
    policies.locate_shard(lost).unlink()
    partial = dataclasses.replace(partial, tensors=partial.tensors[1:])
    misshapen = policies.publish({"model.norm.weight": torch.ones(65)})
    bad = [
        (corrupt, CorruptionError),
        (lost, WeightsUnavailableError),
        (partial, CorruptionError),
        (misshapen, CorruptionError),
    ]
    prompt = next(prompts)
    for manifest, error in bad:
        with pytest.raises(error):
            await engine.update_weights(manifest)
        generation = await engine.generate(prompt, WARM)
        assert set(generation.policy_versions.tolist()) == {version}
        assert policies.measure_error(prompt, generation) < TOLERANCE
    assert engine.stats.num_weight_updates == num_updates
    await engine.update_weights(policies.publish())
    assert engine.policy_version > version


async def test_deltas_are_served_and_a_damaged_one_is_not(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    """The worker process keeps the version it read last; without one it reads the store."""
    whole, first, second, damaged, _, later = (policies.publish_bfloat16() for _ in range(6))
    assert [manifest.base_version for manifest in (whole, first)] == [None, whole.policy_version]
    shard = policies.locate_shard(damaged)
    *intact, last = shard.read_bytes()
    prompt = next(prompts)
    for manifest in (whole, first, second, damaged, first, later):
        is_damaged = manifest is damaged
        shard.write_bytes(bytes([*intact, last ^ 1]) if is_damaged else bytes([*intact, last]))
        if is_damaged:
            with pytest.raises(CorruptionError, match="SHA-256"):
                await engine.update_weights(manifest)
        else:
            await engine.update_weights(manifest)
        generation = await engine.generate(prompt, WARM)
        assert set(generation.policy_versions.tolist()) == {
            (second if is_damaged else manifest).policy_version
        }
        assert policies.measure_error(prompt, generation) < TOLERANCE


async def test_a_cancelled_caller_neither_stalls_generation_nor_the_update(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    manifest = policies.publish()
    update = asyncio.create_task(engine.update_weights(manifest))
    request = asyncio.create_task(engine.generate(next(prompts), WARM))
    await asyncio.sleep(0)
    update.cancel()
    request.cancel()
    await asyncio.wait([update, request])
    assert update.cancelled()
    assert request.cancelled()
    await engine.update_weights(manifest)
    assert engine.policy_version == manifest.policy_version
    assert set((await engine.generate(next(prompts), WARM)).policy_versions.tolist()) == {
        manifest.policy_version
    }
    assert engine.stats.num_running_requests == 0


async def test_stats_count_tokens(engine: VllmEngine, prompts: Any) -> None:
    before, prompt = engine.stats, next(prompts)
    generations = [await engine.generate(prompt, WARM) for _ in range(2)]
    after = engine.stats
    assert after.num_prompt_tokens - before.num_prompt_tokens == 200
    assert after.num_cached_tokens - before.num_cached_tokens == 96
    assert after.num_generated_tokens - before.num_generated_tokens == sum(
        len(g.logprobs) for g in generations
    )
    assert after.weight_pause_s > 0


async def test_an_engine_that_dies_says_so_and_stays_dead(
    engine: VllmEngine, policies: Policies, prompts: Any
) -> None:
    """Last on the module's engine. vLLM itself would leave the update waiting for ever."""
    running: list[asyncio.Task[Any]] = [
        asyncio.create_task(engine.generate(prompt, WARM))
        for prompt in itertools.islice(prompts, 4)
    ]
    running.append(asyncio.create_task(engine.update_weights(policies.publish())))
    await asyncio.sleep(0)
    for process in psutil.Process().children():
        if "EngineCore" in process.name():
            process.kill()
    results = await asyncio.gather(*running, return_exceptions=True)
    assert {type(result) for result in results} == {EngineFailedError}
    assert not engine.is_alive
    with pytest.raises(EngineFailedError, match="Restart the service"):
        await engine.generate(next(prompts), WARM)
    with pytest.raises(EngineFailedError):
        await engine.update_weights(policies.publish())
    await engine.stop()
    with pytest.raises(UnavailableError, match="not running"):
        await engine.generate(next(prompts), WARM)


@pytest.mark.slow
async def test_stopping_ends_running_generations_at_once(policies: Policies, prompts: Any) -> None:
    engine = build_engine(policies)
    assert not engine.is_alive
    await engine.start()
    endless = dataclasses.replace(WARM, temperature=0.0)
    running = [
        asyncio.create_task(engine.generate(prompt, endless))
        for prompt in itertools.islice(prompts, 64)
    ]
    await asyncio.sleep(0)
    await engine.stop()
    results = await asyncio.gather(*running, return_exceptions=True)
    assert {type(result) for result in results} == {UnavailableError}
    assert not engine.is_alive
    await engine.stop()
