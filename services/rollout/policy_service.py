"""PolicyService over gRPC: samples responses for agents whose loop runs elsewhere.

It decides nothing about weights.
"""

from __future__ import annotations

import functools
from typing import Any

from sdar.contracts.codec import (
    chat_messages_from_proto,
    model_to_proto,
    sampling_from_proto,
    stop_reason_to_proto,
)
from sdar.contracts.errors import CapacityError, InvalidInputError, StaleError
from sdar.contracts.types import ModelIdentity
from sdar.model.chat import ChatTokenizer
from sdar.v1 import policy_pb2, policy_pb2_grpc
from sdar.wire.answers import KeptAnswers
from services.rollout.engine import Engine

SERVICE_NAME = "sdar.v1.PolicyService"

_NUM_KEPT_ANSWERS = 1024
"""Finished answers kept for callers that repeat a request id."""


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Translates; errors pass as they are, the server turns them into statuses.

    Args:
        max_requests: responses sampled at once for callers of this service.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        *,
        run_id: str,
        model: ModelIdentity,
        max_model_tokens: int,
        max_requests: int,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._run_id = run_id
        self._model = model
        self._max_model_tokens = max_model_tokens
        self._max_requests = max_requests
        self._num_requests = 0
        # With room for all that are being made: what is refused is refused by `max_requests`.
        self._answers: KeptAnswers[policy_pb2.GenerateResponse] = KeptAnswers(
            _NUM_KEPT_ANSWERS + max_requests
        )

    async def Generate(
        self, request: policy_pb2.GenerateRequest, context: Any
    ) -> policy_pb2.GenerateResponse:
        """A repeated request id gets the first one's answer, even while that is being made."""
        generate = functools.partial(self._generate, request)
        return await self._answers.get_or_make(request.request_id, request, generate)

    async def GetPolicy(
        self, request: policy_pb2.GetPolicyRequest, context: Any
    ) -> policy_pb2.GetPolicyResponse:
        return policy_pb2.GetPolicyResponse(
            run_id=self._run_id,
            model=model_to_proto(self._model),
            policy_version=self._engine.policy_version,
            num_running_requests=self._engine.stats.num_running_requests,
            max_model_tokens=self._max_model_tokens,
        )

    async def _generate(self, request: policy_pb2.GenerateRequest) -> policy_pb2.GenerateResponse:
        self._check(request)
        prompt = self._prompt(request)
        # No await since the check: no more get in than are allowed.
        self._num_requests += 1
        try:
            generation = await self._engine.generate(prompt, sampling_from_proto(request.sampling))
        finally:
            self._num_requests -= 1
        return policy_pb2.GenerateResponse(
            request_id=request.request_id,
            prompt_token_ids=prompt,
            response_token_ids=generation.response_token_ids.tolist(),
            behavior_logprobs=generation.logprobs.tolist(),
            policy_versions=generation.policy_versions.tolist(),
            text=self._tokenizer.decode_response(generation.response_token_ids.tolist()),
            stop_reason=stop_reason_to_proto(generation.stop_reason),
        )

    def _check(self, request: policy_pb2.GenerateRequest) -> None:
        if self._num_requests >= self._max_requests:
            raise CapacityError(
                f"{self._num_requests} responses are being sampled, the limit is "
                f"{self._max_requests}. Retry after a while.",
                limit=self._max_requests,
            )
        if self._engine.policy_version < request.min_policy_version:
            raise StaleError(
                f"This worker samples policy version {self._engine.policy_version}, version "
                f"{request.min_policy_version} is asked for. Repeat when it is published, or ask "
                "for an older one.",
                policy_version=self._engine.policy_version,
            )

    def _prompt(self, request: policy_pb2.GenerateRequest) -> list[int]:
        match request.WhichOneof("prompt"):
            case "tokens":
                return list(request.tokens.token_ids)
            case "chat" if request.chat.messages:
                messages = chat_messages_from_proto(request.chat.messages)
                # Before they are rendered: a tokenizer takes long over a text of any size.
                self._tokenizer.check_size(messages, self._max_model_tokens)
                prompt: list[int] = self._tokenizer.render_fresh(messages).tolist()
                return prompt
            case _:
                raise InvalidInputError(
                    "GenerateRequest has no prompt. Set `tokens`, or `chat` with at least one "
                    "message."
                )
