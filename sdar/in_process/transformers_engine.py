"""Samples without vLLM, in this process and one thread, for models of a few million parameters.

Requests that wait at the same time are sampled together, as one wave, and a wave holds the event
loop until it is done: that is what makes 128 episodes of a tiny model cost half a second. Weights
therefore change between waves, and every response is of one policy version. For anything larger use
vLLM.

Axes: R rows (responses of one wave), P prompt tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdar.contracts.errors import EngineFailedError, InvalidInputError, UnavailableError
from sdar.contracts.types import SamplingParameters, StopReason, TokenIds, WeightsManifest
from sdar.in_process.ragged_decoder import KeyValues, RaggedDecoder
from sdar.model.causal_lm import install_tensors, load_causal_lm
from services.rollout.engine import EngineStats, Generation

_QUIET_TURNS = 10
"""Turns of the event loop that a wave waits for more callers.

Enough for an environment in this process to answer: a tenth of a millisecond, against a wave's
twenty.
"""


class WeightReader(Protocol):
    """The part of a weight store that the engine needs."""

    def iter_tensors(self, manifest: WeightsManifest) -> Iterable[tuple[str, Tensor]]: ...


@dataclass(slots=True, eq=False)
class _Request:
    """One caller's prompt and what was sampled for it. `key` is the prompt as int32 bytes."""

    prompt: list[int]
    key: bytes
    sampling: SamplingParameters
    max_response_tokens: int
    answer: asyncio.Future[Generation]
    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine:
    """Implements `Engine` on a Hugging Face Qwen2 model.

    It is seeded: the same requests in the same waves give the same tokens.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: str,
        max_sequence_tokens: int,
        stop_token_ids: Sequence[int],
        store: WeightReader | None = None,
        seed: int = 0,
        max_cached_tokens: int = 262_144,
    ) -> None:
        """Args:
        store: where `update_weights` reads; without one, weights come through `install` only.
        max_cached_tokens: key-value pairs kept of finished responses, in case their conversation
            goes on.
        """
        self._model_path = model_path
        self._dtype = dtype
        self._max_tokens = max_sequence_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._store = store
        self._generator = torch.Generator().manual_seed(seed)
        self._cache = _PrefixCache(max_cached_tokens)
        self._pending: list[_Request] = []
        self._arrived = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._num_tokens: Counter[str] = Counter()
        self._num_updates = 0
        self._staging_s = 0.0
        self._pause_s = 0.0
        self._version = 0

    @property
    def policy_version(self) -> int:
        return self._version

    @property
    def is_alive(self) -> bool:
        return self._runner is not None and not self._runner.done()

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_generated_tokens=self._num_tokens["generated"],
            num_prompt_tokens=self._num_tokens["prompt"],
            num_cached_tokens=self._num_tokens["cached"],
            num_running_requests=len(self._pending),
            num_weight_updates=self._num_updates,
            weight_staging_s=self._staging_s,
            weight_pause_s=self._pause_s,
        )

    async def start(self) -> None:
        self._model = load_causal_lm(self._model_path, self._dtype)
        self._decoder = RaggedDecoder(self._model, self._max_tokens)
        self._runner = asyncio.create_task(self._run(), name="transformers_engine")

    async def stop(self) -> None:
        if self._runner is None:
            return
        # None first: from here on callers are refused.
        runner, self._runner = self._runner, None
        runner.cancel()
        # Not awaited itself: it may have died of an error that its callers were given.
        await asyncio.wait([runner])
        self._fail_pending(
            UnavailableError(
                "The sampler was stopped while the request waited. Repeat it elsewhere."
            )
        )

    async def generate(
        self, prompt_token_ids: Sequence[int] | TokenIds, sampling: SamplingParameters
    ) -> Generation:
        self._require_running()
        request = self._build_request(prompt_token_ids, sampling)
        self._pending.append(request)
        self._arrived.set()
        return await request.answer

    async def update_weights(self, manifest: WeightsManifest) -> None:
        self._require_running()
        if manifest.policy_version == self._version:
            return
        if self._store is None:
            raise UnavailableError(
                "This sampler has no weight store to read from. Build it with one, or use "
                "`install`."
            )
        started = time.perf_counter()
        tensors = await asyncio.to_thread(_read_tensors, self._store, manifest)
        self._staging_s = time.perf_counter() - started
        self.install(manifest.policy_version, tensors)

    def install(self, policy_version: int, tensors: Mapping[str, Tensor]) -> None:
        """Switch to weights that are at hand, under the names of `export_tensors`.

        Raises:
            CorruptionError: they are not of this model.
        """
        # Nothing awaits from here to the end, so no wave is sampled halfway through.
        started = time.perf_counter()
        install_tensors(self._model, tensors.items())
        self._decoder.refresh()
        # Keys and values of the old weights belong to no policy.
        self._cache.clear()
        self._version = policy_version
        self._num_updates += 1
        self._pause_s = time.perf_counter() - started

    def _require_running(self) -> None:
        if self._runner is None:
            raise UnavailableError("The sampler is not running. Start it first.")
        if self._runner.done():
            raise EngineFailedError("The sampler has died; the log says why. Restart the service.")

    def _build_request(
        self, prompt_token_ids: Sequence[int] | TokenIds, sampling: SamplingParameters
    ) -> _Request:
        # In 64 bits: a caller outside may send any uint32.
        prompt = np.asarray(prompt_token_ids, dtype=np.int64)
        _check_sampling(sampling)
        self._check_prompt(prompt)
        return _Request(
            prompt=prompt.tolist(),
            key=prompt.astype(np.int32).tobytes(),
            sampling=sampling,
            max_response_tokens=min(sampling.max_response_tokens, self._max_tokens - len(prompt)),
            answer=asyncio.get_running_loop().create_future(),
        )

    def _check_prompt(self, prompt: npt.NDArray[np.int64]) -> None:
        if not 0 < len(prompt) < self._max_tokens:
            raise InvalidInputError(
                f"Prompt of {len(prompt)} tokens; this sampler takes 1 to {self._max_tokens - 1}. "
                "End the episode earlier or raise model.max_sequence_tokens."
            )
        vocabulary_size = self._model.config.vocab_size
        if prompt.min() < 0 or prompt.max() >= vocabulary_size:
            raise InvalidInputError(
                f"The prompt holds token ids outside 0 to {vocabulary_size - 1}. Tokenize with the "
                "model's own tokenizer."
            )

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await self._wait_for_companions()
            self._arrived.clear()
            # Without those whose callers have given up.
            wave = [request for request in self._pending if not request.answer.done()]
            try:
                if wave:
                    self._sample_wave(wave)
            except Exception as error:
                self._fail_pending(
                    EngineFailedError(
                        f"The sampler died: {error}. The log says why. Restart the service."
                    )
                )
                raise
            self._pending.clear()

    async def _wait_for_companions(self) -> None:
        """Give way until some turns of the event loop in a row bring no new request.

        Callers that were just answered ask again within a few turns.
        """
        num_seen = len(self._pending)
        num_quiet_turns = 0
        while num_quiet_turns < _QUIET_TURNS:
            await asyncio.sleep(0)
            num_quiet_turns = num_quiet_turns + 1 if num_seen == len(self._pending) else 0
            num_seen = len(self._pending)

    def _fail_pending(self, error: UnavailableError | EngineFailedError) -> None:
        for request in self._pending:
            if not request.answer.done():
                request.answer.set_exception(error)
        self._pending.clear()

    @torch.inference_mode()
    def _sample_wave(self, wave: list[_Request]) -> None:
        max_response = max(request.max_response_tokens for request in wave)
        cache, hidden, num_cached = self._prefill(wave, max_response)
        lengths = torch.tensor([len(request.prompt) for request in wave])
        sampler = _RowSampler([request.sampling for request in wave], self._generator)
        is_open = [True] * len(wave)
        for _ in range(max_response):
            token_ids, logprobs = sampler.draw(self._decoder.compute_logits(hidden))
            self._append(wave, is_open, token_ids.tolist(), logprobs.tolist())
            if not any(is_open):
                break
            # A finished row is fed its last token again and again, at the same place. Nobody reads
            # what comes of it, and the other rows keep their places in the batch.
            hidden = self._decoder.decode(token_ids, lengths, cache)
            lengths = lengths + torch.tensor(is_open)
        for row, request in enumerate(wave):
            self._answer(request, cache[:, :, row], num_cached[row])

    def _prefill(
        self, wave: list[_Request], max_response: int
    ) -> tuple[KeyValues, Float[Tensor, "R H"], list[int]]:
        """Feed the prompts, as far as no cached sequence begins them.

        Returns:
            The cache with every prompt in it, the hidden state after each prompt, and how many of
            its tokens were cached.
        """
        # One request of each prompt.
        unique = list({request.key: request for request in wave}.values())
        num_positions = max(len(request.prompt) for request in unique) + max_response
        cache = self._decoder.allocate(len(unique), num_positions)
        starts = self._load_cached([request.key for request in unique], cache)
        new = [request.prompt[start:] for request, start in zip(unique, starts, strict=True)]
        hidden = self._decoder.prefill(new, starts, cache)
        if len(unique) == len(wave):
            return cache, hidden, starts
        # The episodes of a group begin with the same prompt: it was computed once and is now
        # copied.
        row_of = {request.key: row for row, request in enumerate(unique)}
        rows = [row_of[request.key] for request in wave]
        index = torch.tensor(rows)
        return cache.index_select(2, index), hidden[index], [starts[row] for row in rows]

    def _load_cached(self, keys: Sequence[bytes], cache: KeyValues) -> list[int]:
        """Fill each row with the cached start of its prompt; returns how many tokens that was."""
        starts: list[int] = []
        for row, key in enumerate(keys):
            entry = self._cache.find(key)
            start = 0 if entry is None else entry.shape[3]
            if entry is not None:
                cache[:, :, row, :, :start] = entry
            starts.append(start)
        return starts

    def _append(
        self, wave: list[_Request], is_open: list[bool], token_ids: list[int], logprobs: list[float]
    ) -> None:
        for row, request in enumerate(wave):
            if is_open[row]:
                request.response.append(token_ids[row])
                request.logprobs.append(logprobs[row])
                is_full = len(request.response) == request.max_response_tokens
                is_open[row] = token_ids[row] not in self._stop_token_ids and not is_full

    def _answer(self, request: _Request, row: Float[Tensor, "2 L K S D"], num_cached: int) -> None:
        response = np.asarray(request.response, dtype=np.int32)
        is_ended = request.response[-1] in self._stop_token_ids
        # The last token was never fed, so its keys and values are not there.
        num_fed = len(request.prompt) + len(response) - 1
        # A copy: a view would keep the whole wave's cache in memory.
        self._cache.put(request.key + response[:-1].tobytes(), row[:, :, :, :num_fed].clone())
        self._num_tokens.update(
            generated=len(response), prompt=len(request.prompt), cached=num_cached
        )
        if not request.answer.done():
            request.answer.set_result(
                Generation(
                    response_token_ids=response,
                    logprobs=np.asarray(request.logprobs, dtype=np.float32),
                    policy_versions=np.full(len(response), self._version, dtype=np.int32),
                    stop_reason=StopReason.END_OF_TURN if is_ended else StopReason.LENGTH,
                    num_cached_tokens=num_cached,
                )
            )


def _check_sampling(sampling: SamplingParameters) -> None:
    is_possible = 0 <= sampling.temperature < math.inf and 0 < sampling.top_p <= 1
    if not is_possible or sampling.max_response_tokens < 1:
        raise InvalidInputError(
            f"Cannot sample with {sampling}: temperature at least 0 and finite, top_p in (0, 1], "
            "max_response_tokens at least 1."
        )


def _read_tensors(store: WeightReader, manifest: WeightsManifest) -> dict[str, Tensor]:
    return dict(store.iter_tensors(manifest))


class _PrefixCache:
    """Keys and values of token sequences under the present weights.

    The least recently used are dropped first.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self._num_with_size: Counter[int] = Counter()
        self._num_tokens = 0

    def find(self, key: bytes) -> Float[Tensor, "2 L K S D"] | None:
        """The longest entry whose tokens begin the sequence `key` (int32 bytes), None for none.

        It leaves at least one token to compute, whose hidden state the first draw needs.
        """
        # One look-up for each length that an entry has: conversations of a run have few.
        for size in sorted(self._num_with_size, reverse=True):
            if size < len(key) and (entry := self._entries.get(key[:size])) is not None:
                self._entries.move_to_end(key[:size])
                return entry
        return None

    def put(self, key: bytes, entry: Tensor) -> None:
        if not key or key in self._entries:
            return
        self._entries[key] = entry
        self._count(key, entry, 1)
        while self._num_tokens > self._max_tokens:
            self._count(*self._entries.popitem(last=False), -1)

    def clear(self) -> None:
        self._entries.clear()
        self._num_with_size.clear()
        self._num_tokens = 0

    def _count(self, key: bytes, entry: Tensor, sign: int) -> None:
        self._num_tokens += sign * entry.shape[3]
        self._num_with_size[len(key)] += sign
        if not self._num_with_size[len(key)]:
            del self._num_with_size[len(key)]


class _RowSampler:
    """Draws one token per row, each under its own temperature and top_p."""

    def __init__(self, samplings: Sequence[SamplingParameters], generator: torch.Generator) -> None:
        temperatures = torch.tensor([sampling.temperature for sampling in samplings])[:, None]
        self._is_greedy = temperatures[:, 0] == 0
        self._has_greedy = bool(self._is_greedy.any())
        # A greedy token's log-prob is that of the unscaled distribution.
        self._temperatures = torch.where(temperatures == 0, 1.0, temperatures)
        top_p = torch.tensor([sampling.top_p for sampling in samplings])[:, None]
        self._top_p = (
            torch.where(temperatures == 0, 1.0, top_p) if bool((top_p < 1).any()) else None
        )
        self._generator = generator

    def draw(self, logits: Float[Tensor, "R V"]) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
        """Token ids and their log-probs under the distribution they were drawn from."""
        logprobs = torch.log_softmax(logits / self._temperatures, dim=-1)
        if self._top_p is not None:
            logprobs = _keep_nucleus(logprobs, self._top_p)
        # Inversion in float64: one uniform a row is twenty times cheaper than torch.multinomial's
        # draw per vocabulary entry.
        cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
        uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=self._generator)
        token_ids = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
        token_ids = token_ids.clamp_(max=logits.shape[1] - 1)
        if self._has_greedy:
            token_ids = torch.where(self._is_greedy, logprobs.argmax(dim=-1), token_ids)
        return token_ids, logprobs.gather(-1, token_ids[:, None])[:, 0]


def _keep_nucleus(
    logprobs: Float[Tensor, "R V"], top_p: Float[Tensor, "R 1"]
) -> Float[Tensor, "R V"]:
    """The most probable tokens that together reach top_p, renormalised; -inf elsewhere."""
    ordered, order = logprobs.sort(dim=-1, descending=True)
    mass = ordered.exp()
    # Outside is a token before which the others reach top_p; the most probable one never is.
    is_outside = mass.cumsum(dim=-1) - mass >= top_p
    # Back from the order of probability to that of the vocabulary.
    is_outside = torch.zeros_like(is_outside).scatter(-1, order, is_outside)
    return torch.log_softmax(logprobs.masked_fill(is_outside, -torch.inf), dim=-1)
