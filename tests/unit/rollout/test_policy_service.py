"""What PolicyService promises while a sample is still being made; the rest is tested over gRPC."""

from __future__ import annotations

import asyncio

import pytest

from sdar.contracts.codec import sampling_to_proto
from sdar.contracts.errors import CapacityError, ContractError
from sdar.v1 import policy_pb2
from services.rollout.policy_service import PolicyServicer
from tests.unit.rollout.fakes import MODEL, RUN_ID, SAMPLING, ScriptedEngine


class SlowEngine(ScriptedEngine):
    """Samples when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.num_calls = 0

    async def generate(self, prompt_token_ids, sampling):
        self.num_calls += 1
        await self.go.wait()
        return await super().generate(prompt_token_ids, sampling)


def build(engine, tokenizer, max_requests=2):
    return PolicyServicer(
        engine,
        tokenizer,
        run_id=RUN_ID,
        model=MODEL,
        max_model_tokens=128,
        max_requests=max_requests,
    )


def request(request_id=""):
    return policy_pb2.GenerateRequest(
        request_id=request_id, tokens={"token_ids": [5, 6]}, sampling=sampling_to_proto(SAMPLING)
    )


async def test_a_caller_that_hangs_up_finds_the_answer_when_it_repeats(tokenizer):
    engine = SlowEngine()
    servicer = build(engine, tokenizer)
    first = asyncio.create_task(servicer.Generate(request("r"), None))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    engine.go.set()
    answer = await servicer.Generate(request("r"), None)
    assert (list(answer.response_token_ids), engine.num_calls) == ([10, 11, 2], 1)


async def test_more_requests_than_allowed_are_refused_for_now(tokenizer):
    engine = SlowEngine()
    servicer = build(engine, tokenizer, max_requests=2)
    running = [asyncio.create_task(servicer.Generate(request(), None)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(CapacityError, match="limit is 2"):
        await servicer.Generate(request(), None)
    engine.go.set()
    await asyncio.gather(*running)
    await servicer.Generate(request(), None)


async def test_a_text_that_no_context_can_hold_is_refused_before_it_is_tokenised(tokenizer):
    servicer = build(SlowEngine(), tokenizer)
    chat = {"messages": [{"role": "user", "content": "x" * (2 << 20)}]}
    with pytest.raises(ContractError, match="2097152 characters"):
        await servicer.Generate(
            policy_pb2.GenerateRequest(chat=chat, sampling=sampling_to_proto(SAMPLING)), None
        )
