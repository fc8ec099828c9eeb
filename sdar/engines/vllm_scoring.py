"""Scores token sequences with a running vLLM, by the log-probs that it returns for a prompt.

They are of the untempered distribution, whatever `logprobs_mode` the engine has.

Axes: L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdar.contracts.errors import EngineFailedError
from sdar.contracts.types import LogProbs


async def score_sequence(llm: Any, token_ids: Sequence[int], request_id: str) -> LogProbs:
    """float32 [L - 1]: the log-prob of every token but the first, which nothing predicts.

    Args:
        token_ids: [L], one token shorter than the engine's longest sequence.
        request_id: unique among the engine's running requests.
    """
    prompt = {"type": "token", "prompt_token_ids": list(token_ids)}
    async for output in llm.generate(prompt, _build_parameters(), request_id):
        final = output
    if final.prompt_logprobs is None:
        raise EngineFailedError(
            f"vLLM ended scoring as {final.outputs[0].finish_reason!r}: the engine is stopping."
        )
    logprobs = np.asarray(final.prompt_logprobs.logprobs, np.float32)
    if len(logprobs) != len(token_ids) - 1:
        raise EngineFailedError(
            f"vLLM returned {len(logprobs)} log-probs for a prompt of {len(token_ids)} tokens, "
            "expected one for each but the first. Use the vLLM version this project pins."
        )
    return logprobs


def _build_parameters() -> Any:
    """Log-probs of the prompt, and the one token that vLLM insists on sampling."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,  # the prompt's own tokens only
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
