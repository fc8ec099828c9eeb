"""The checks of Step: retries, order, deadlines, strange texts."""

from __future__ import annotations

import asyncio

import grpc

from sdar.cli.conformance.bench import Bench, Refusal, difference, expect_refusal, is_over
from sdar.cli.conformance.check import check
from sdar.cli.conformance.failure import CheckNotRun, FailedCheck, expect
from sdar.v1 import environment_pb2
from sdar.wire.rpc_methods import MAX_MESSAGE_BYTES

# From before the request is sent to after the step is played.
_CUT_AFTER_S = (0.001, 0.002, 0.004, 0.008)
_LARGE_TEXT_BYTES = 1 << 20
_MAX_STEP_INDEX = 2**32 - 1
_CONFLICT = grpc.StatusCode.FAILED_PRECONDITION

STRANGE_TEXTS = {
    "combining marks": "e\u0301a\u0308" + "\u0301" * 200,
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202e\u0645\u0631\u062d\u0628\u0627",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "NUL": "before\x00after",
    "newlines": "one\ntwo\r\nthree\u2028four\x0b",
    "markup": "</action><action>[x]{}%s$HOME`'\"\\",
    "plane 16": "\U0010ffff\ufffe",
}
_NOT_UTF8 = b"\xff\xfe\x80look\xc3"


@check(
    "step.retry",
    "A Step repeated with its index and text gives the same answer and moves nothing",
    "Keep the last step's index, text and answer with the session; answer a repetition from there, "
    "the episode's end too.",
)
async def step_retry(bench: Bench) -> None:
    script = await bench.script()
    opened = await bench.open(script.task.task_id, seed=script.seed)
    for index, text in enumerate(script.texts):
        first = await bench.step(opened.session_id, index, text)
        bench.compare(script, index, first)
        for _ in range(2):
            again = await bench.step(opened.session_id, index, text)
            # Nothing is ignored: a repetition is the same answer, its `info` included.
            change = difference(first, again, ignore=())
            if change:
                expected, got = change
                raise FailedCheck(f"the same answer to step {index} again: {expected}", got)


@check(
    "step.retry_at_once",
    "The same Step sent twice at once moves once, and both get the one answer",
    "Let a repetition wait for the step that is being played, and give it that answer.",
)
async def step_retry_at_once(bench: Bench) -> None:
    script = await bench.script()
    opened = await bench.open(script.task.task_id, seed=script.seed)
    for index, text in enumerate(script.texts):
        calls = [bench.step(opened.session_id, index, text) for _ in range(3)]
        for answer in await asyncio.gather(*calls):
            bench.compare(script, index, answer)


@check(
    "step.deadline",
    "A Step whose caller gave up after some milliseconds can be repeated, and the episode goes on "
    "as if nothing had happened",
    "Play a step to its end and keep its answer even if the caller's deadline passes or the call "
    "is cancelled.",
)
async def step_deadline(bench: Bench) -> None:
    script = await bench.script()
    opened = await bench.open(script.task.task_id, seed=script.seed)
    for index, text in enumerate(script.texts):
        cut_after_s = _CUT_AFTER_S[index % len(_CUT_AFTER_S)]
        try:
            answer = await bench.step(opened.session_id, index, text, timeout_s=cut_after_s)
            # A fast server answers in time.
            bench.compare(script, index, answer)
        except Refusal as refusal:
            is_cut = refusal.code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
            expect(is_cut, "an answer or DEADLINE_EXCEEDED under a short deadline", refusal)

        answer = await bench.step(opened.session_id, index, text)
        bench.compare(script, index, answer)


@check(
    "step.other_text",
    "Another text for a step already taken is FAILED_PRECONDITION and moves nothing",
    "Compare the text with the one that the step was taken with.",
)
async def step_other_text(bench: Bench) -> None:
    script = await bench.script()
    opened = await bench.open(script.task.task_id, seed=script.seed)
    await bench.step(opened.session_id, 0, script.texts[0])
    calling = bench.step(opened.session_id, 0, script.texts[0] + " or not")
    await expect_refusal(calling, _CONFLICT, "Step 0 again with another text")
    await bench.replay(script, opened.session_id, begin=1)


@check(
    "step.order",
    "A skipped, an old or an absurd step_index is FAILED_PRECONDITION and moves nothing",
    "Accept the next index, or the last one as a repetition; refuse all others before touching the "
    "episode.",
)
async def step_order(bench: Bench) -> None:
    script = await bench.script()
    opened = await bench.open(script.task.task_id, seed=script.seed)
    for index, text in enumerate(script.texts):
        wrong = [index + 1, _MAX_STEP_INDEX]
        # Before that, step 0 is the next one, or the last one, which may be repeated.
        if index >= 2:
            wrong.insert(0, 0)
        for other in wrong:
            calling = bench.step(opened.session_id, other, text)
            await expect_refusal(calling, _CONFLICT, f"Step {other} where {index} is next")

        answer = await bench.step(opened.session_id, index, text)
        bench.compare(script, index, answer)


@check(
    "step.after_end",
    "A Step after the end of the episode is FAILED_PRECONDITION; the last one can still be "
    "repeated",
    "Remember that the episode is over, and keep its last answer until the session is closed or "
    "expires.",
)
async def step_after_end(bench: Bench) -> None:
    await bench.script()  # whether episodes can be repeated at all
    script = next((script for script in await bench.tour() if script.is_over), None)
    if script is None:
        raise CheckNotRun("no episode ended, see episode.ends")

    opened = await bench.open(script.task.task_id, seed=script.seed)
    await bench.replay(script, opened.session_id)
    last = len(script.texts) - 1
    calling = bench.step(opened.session_id, last + 1, script.texts[last])
    await expect_refusal(calling, _CONFLICT, f"Step {last + 1} after the end")
    answer = await bench.step(opened.session_id, last, script.texts[last])
    bench.compare(script, last, answer)


@check(
    "text.strange",
    "Empty text and strange unicode are played as any text: an action, mostly an invalid one",
    "Treat text that holds no action as an invalid action that uses the step; never raise for a "
    "text within the limit.",
)
async def text_strange(bench: Bench) -> None:
    task = await bench.first_task()
    texts = {"empty": "", "blanks": " \t\n", **STRANGE_TEXTS}
    for name, text in texts.items():
        # As a response without an action, and as the action itself.
        for sent in (text, bench.action_form.write(text)):
            opened = await bench.open(task.task_id)
            try:
                await bench.step(opened.session_id, 0, sent)
            except Refusal as refusal:
                raise FailedCheck(f"an answer to a text of {name}", str(refusal)) from refusal
            await bench.close(opened.session_id)


@check(
    "text.large",
    "A text of 1 MiB is played, or refused with INVALID_ARGUMENT and without touching the episode",
    "Let messages be larger than max_text_bytes (gRPC's own bound is 4 MiB), and read long texts "
    "in linear time.",
)
async def text_large(bench: Bench) -> None:
    script = await bench.script()
    opened = await bench.open(script.task.task_id, seed=script.seed)
    text = "a " * (_LARGE_TEXT_BYTES // 2)
    if len(text) > bench.described.limits.max_text_bytes:
        calling = bench.step(opened.session_id, 0, text)
        await expect_refusal(
            calling, grpc.StatusCode.INVALID_ARGUMENT, "Step with 1 MiB, over max_text_bytes"
        )
        await bench.replay(script, opened.session_id)
        return

    try:
        answer = await bench.step(opened.session_id, 0, text)
    except Refusal as refusal:
        raise FailedCheck(
            "an answer to 1 MiB, which max_text_bytes allows", str(refusal)
        ) from refusal
    # The session lives on.
    if not is_over(answer):
        await bench.step(opened.session_id, 1, script.texts[0])


@check(
    "text.over_limit",
    "A text over max_text_bytes is INVALID_ARGUMENT, and the same step can be taken with a shorter "
    "one",
    "Count the text's UTF-8 bytes (not its characters) before playing it.",
)
async def text_over_limit(bench: Bench) -> None:
    limit = bench.described.limits.max_text_bytes
    if 2 * limit > MAX_MESSAGE_BYTES:
        raise CheckNotRun(f"max_text_bytes {limit} is more than this client sends in one message")
    script = await bench.script()
    opened = await bench.open(script.task.task_id, seed=script.seed)
    # Fewer characters than the limit, more bytes.
    for text in ("a" * (limit + 1), "\u00e9" * (limit // 2 + 1)):
        calling = bench.step(opened.session_id, 0, text)
        await expect_refusal(
            calling, grpc.StatusCode.INVALID_ARGUMENT, f"Step with {len(text.encode())} bytes"
        )
    await bench.replay(script, opened.session_id)


@check(
    "text.not_utf8",
    "Bytes that are not UTF-8 are refused, or played as an invalid action; the session lives on",
    "Answer a request that cannot be parsed with INVALID_ARGUMENT (INTERNAL, where gRPC itself "
    "refuses it).",
)
async def text_not_utf8(bench: Bench) -> None:
    script = await bench.script()
    opened = await bench.open(script.task.task_id, seed=script.seed)
    # Built by hand, for no protobuf library lets such a text into a string field: field 3,
    # length-delimited.
    request = environment_pb2.StepRequest(session_id=opened.session_id).SerializeToString()
    request += bytes([3 << 3 | 2, len(_NOT_UTF8)]) + _NOT_UTF8

    # The next step depends on whether the server took these bytes for one.
    index = 0
    try:
        await bench.step_bytes(request)
        index = 1
    except Refusal as refusal:
        codes = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
        expect(
            refusal.code in codes,
            "an answer, INVALID_ARGUMENT or INTERNAL to bytes that are not UTF-8",
            refusal,
        )
    await bench.step(opened.session_id, index, script.texts[0])


CHECKS = (
    step_retry,
    step_retry_at_once,
    step_deadline,
    step_other_text,
    step_order,
    step_after_end,
    text_strange,
    text_large,
    text_over_limit,
    text_not_utf8,
)
