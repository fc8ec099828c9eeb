"""Owns the sampler: token ids in, sampled tokens out, each stamped with the policy version that sampled it.

It never renders prompts, decodes text or knows what an episode is.

Axes: P prompt tokens, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sdar.contracts.types import LogProbs, PolicyVersions, SamplingParameters, StopReason, TokenIds, WeightsManifest


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """One sampled response.

    Attributes:
        response_token_ids: int32 [T]; ends with the end-of-turn token when `stop_reason` is END_OF_TURN.
        logprobs: float32 [T], of the distribution each token was drawn from (temperature and top_p applied; a greedy
            token's is that of the unscaled distribution). All finite.
        policy_versions: int32 [T], the policy version that sampled each token.
        num_cached_tokens: how many of the P prompt tokens the prefix cache served.
    """

    response_token_ids: TokenIds
    logprobs: LogProbs
    policy_versions: PolicyVersions
    stop_reason: StopReason
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start and the present load, for metrics."""

    num_generated_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_running_requests: int
    num_weight_updates: int
    weight_update_duration_s: float
    """Duration of the last weight update, 0 before the first."""


class Engine(Protocol):
    """What a rollout worker needs of a sampler. All methods run on one event loop."""

    @property
    def policy_version(self) -> int:
        """The version the next token will be sampled by; -1 before the first `update_weights`."""

    @property
    def is_alive(self) -> bool:
        """False before start, after stop, and for good once the engine has died: the service must then stop."""

    @property
    def stats(self) -> EngineStats: ...

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Ends running generations with UnavailableError. Safe to call twice."""

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParameters) -> Generation:
        """Samples one response. Cancelling the call frees the request.

        Raises:
            InvalidInputError: prompt empty or too long for the context, or sampling parameters out of range.
            UnavailableError: the engine is not running or died.
        """

    async def update_weights(self, manifest: WeightsManifest) -> None:
        """Switches to the manifest's weights between two tokens; running generations go on under the new version.

        Raises:
            CorruptionError, WeightsUnavailableError, ContractError: the weights could not be read or do not fit the model;
                the previous ones still serve.
            UnavailableError: the engine is not running or died.
        """
