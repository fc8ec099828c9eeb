"""PolicyService over gRPC: samples responses for agents whose loop runs elsewhere.

It decides nothing about weights.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections import OrderedDict
from typing import Any

from sdar.contracts.codec import (
    chat_messages_from_proto,
    model_to_proto,
    sampling_from_proto,
    stop_reason_to_proto,
)
from sdar.contracts.errors import CapacityError, ConflictError, InvalidInputError, StaleError
from sdar.contracts.types import ModelIdentity
from sdar.model.chat import ChatTokenizer
from sdar.v1 import policy_pb2, policy_pb2_grpc
from services.rollout.engine import Engine

SERVICE_NAME = "sdar.v1.PolicyService"
MAX_REQUEST_ID_CHARACTERS = 128

_MAX_ANSWERS = 1024
"""Answers kept for callers that repeat a request id."""


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
        self._answers: OrderedDict[str, tuple[bytes, asyncio.Task[policy_pb2.GenerateResponse]]] = (
            OrderedDict()
        )

    async def Generate(
        self, request: policy_pb2.GenerateRequest, context: Any
    ) -> policy_pb2.GenerateResponse:
        """A repeated request id gets the first one's answer, even while that is being made."""
        if not request.request_id:
            return await self._generate(request)
        # Shielded: a caller that hangs up and repeats finds the answer it missed.
        return await asyncio.shield(self._start_or_join(request))

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

    def _start_or_join(
        self, request: policy_pb2.GenerateRequest
    ) -> asyncio.Task[policy_pb2.GenerateResponse]:
        if len(request.request_id) > MAX_REQUEST_ID_CHARACTERS:
            raise InvalidInputError(
                f"request_id has {len(request.request_id)} characters, the limit is "
                f"{MAX_REQUEST_ID_CHARACTERS}. Shorten it."
            )
        # Compared by hash: the answers kept must not keep their requests in memory too.
        content = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        known = self._answers.get(request.request_id)
        if known is not None and known[0] != content:
            raise _build_conflict(request.request_id)
        if known is None or _has_failed(known[1]):
            task = asyncio.create_task(self._generate(request))
            task.add_done_callback(functools.partial(self._drop_failed, request.request_id))
            self._answers[request.request_id] = content, task
        self._answers.move_to_end(request.request_id)
        self._forget_oldest()
        return self._answers[request.request_id][1]

    def _drop_failed(self, request_id: str, task: asyncio.Task[Any]) -> None:
        """A failure is no answer to keep: it would hold the whole request, in its traceback."""
        known = self._answers.get(request_id)
        if known is not None and known[1] is task and _has_failed(task):
            del self._answers[request_id]

    def _forget_oldest(self) -> None:
        """Finished answers only: somebody waits for an unfinished one.

        There are never more than `max_requests` of those.
        """
        surplus = len(self._answers) - _MAX_ANSWERS
        if surplus <= 0:
            return
        finished = [key for key, (_, task) in self._answers.items() if task.done()]
        for key in finished[:surplus]:
            del self._answers[key]

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


def _build_conflict(request_id: str) -> ConflictError:
    return ConflictError(
        f"Request id {request_id!r} was used for another request. Choose a new one for each sample "
        "wanted.",
        request_id=request_id,
    )


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
