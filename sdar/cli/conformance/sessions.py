"""The checks of a session's life: opening, retries by key, leases, capacity, closing."""

from __future__ import annotations

import asyncio
import math
import uuid

import grpc

from sdar.cli.conformance.bench import (
    SETTLE_TIMEOUT_S,
    Bench,
    Refusal,
    difference,
    expect_refusal,
    is_over,
    poll,
)
from sdar.cli.conformance.check import check
from sdar.cli.conformance.failure import CheckNotRun, FailedCheck, expect

MAX_CAPACITY_TRIED = 256
"""Larger servers are not filled: what one bound shows, another would too."""

_EXTREME_SEEDS = (1, -1, 2**63 - 1, -(2**63))
_SHORT_LEASE_S = 0.5
_RENEWED_LEASE_S = 2.0
# Twice this share is over one lease, so the second step needs the first one's renewal.
_STEP_AT_LEASE = 0.7
_SMALL_CAPACITY = 64


@check(
    "open.answer",
    "OpenSession answers with a session id of its own, the task, a first observation and the lease "
    "granted",
    "Fill OpenSessionResponse: session_id (new each time), task as ListTasks gives it, "
    "observation, lease_s up to max_lease_s.",
)
async def open_answer(bench: Bench) -> None:
    await bench.need_places(2)
    task = await bench.first_task()
    limits = bench.described.limits

    # A lease of 0 leaves the choice to the server.
    first = await bench.open(task.task_id, lease_s=0)
    expect(bool(first.observation), "a first observation", "an empty one")
    change = difference(task, first.task, ignore=("seed",))
    expect(change is None, "the task as ListTasks gives it", change)
    is_default = math.isclose(first.lease_s, limits.default_lease_s)
    expect(
        is_default,
        f"default_lease_s {limits.default_lease_s} without a wish for another",
        first.lease_s,
    )

    second = await bench.open(task.task_id, lease_s=2 * limits.max_lease_s)
    is_bounded = 0 < second.lease_s <= limits.max_lease_s
    expect(is_bounded, f"a lease cut to max_lease_s {limits.max_lease_s}", second.lease_s)

    ids = (first.session_id, second.session_id)
    expect(all(ids) and ids[0] != ids[1], "a session id of its own for each session", ids)


@check(
    "open.seed",
    "Every int64 is a seed, and comes back in the task",
    "Take seed as a 64-bit signed integer (a string or BigInt where numbers are doubles) and echo "
    "it in task.seed.",
)
async def open_seed(bench: Bench) -> None:
    task = await bench.first_task()
    for seed in _EXTREME_SEEDS:
        opened = await bench.open(task.task_id, seed=seed)
        expect(opened.task.seed == seed, f"task.seed {seed}", opened.task.seed)
        await bench.close(opened.session_id)


@check(
    "open.retry",
    "OpenSession repeated with its idempotency_key gives the same session and answer, also when "
    "both come at once",
    "Remember the answer by idempotency_key while the session lives; let a second call wait for "
    "the first.",
)
async def open_retry(bench: Bench) -> None:
    await bench.need_places(3)
    task = await bench.first_task()
    script = await bench.script(task, 3)
    key = _new_key()
    first = await bench.open(task.task_id, seed=3, key=key)
    again = await bench.open(task.task_id, seed=3, key=key)
    change = difference(first, again, ignore=())
    expect(change is None, "the same answer to the same key", change)

    other = await bench.open(task.task_id, seed=3)
    expect(other.session_id != first.session_id, "a new session without a key", "the same one")
    # The session is as the first opening left it.
    await bench.replay(script, first.session_id)

    key = _new_key()
    answers = await asyncio.gather(*(bench.open(task.task_id, key=key) for _ in range(3)))
    ids = {answer.session_id for answer in answers}
    expect(len(ids) == 1, "one session for three calls at once with one key", f"{len(ids)}")


@check(
    "open.key_conflict",
    "An idempotency_key used again for another task or seed is FAILED_PRECONDITION",
    "Compare a repeated request with the one that the key opened, and refuse what differs.",
)
async def open_key_conflict(bench: Bench) -> None:
    task, other = await bench.some_tasks(2)
    key = _new_key()
    await bench.open(task.task_id, seed=1, key=key)

    code = grpc.StatusCode.FAILED_PRECONDITION
    calling = bench.open(task.task_id, seed=2, key=key)
    await expect_refusal(calling, code, "OpenSession with a key of another seed")
    # The first split may have one task only.
    if other.task_id != task.task_id:
        calling = bench.open(other.task_id, seed=1, key=key)
        await expect_refusal(calling, code, "OpenSession with a key of another task")


@check(
    "close.twice",
    "CloseSession ends a session, and succeeds for one that is not there",
    "Forget the session, free its place, and answer OK whether or not it was known.",
)
async def close_twice(bench: Bench) -> None:
    script = await bench.script()
    opened = await bench.open(script.task.task_id)
    await bench.step(opened.session_id, 0, script.texts[0])
    await bench.close(opened.session_id)
    # The step that was taken, which a session would answer again, and the next one.
    for step_index in (0, 1):
        calling = bench.step(opened.session_id, step_index, script.texts[0])
        await expect_refusal(calling, grpc.StatusCode.NOT_FOUND, "Step in a closed session")
    absent = {opened.session_id: "closed already", "sdar-check-nobody": "unknown"}
    for session_id, what in absent.items():
        try:
            await bench.close(session_id)
        except Refusal as refusal:
            raise FailedCheck(f"CloseSession of a session {what}: OK", str(refusal)) from refusal


@check(
    "lease.expires",
    f"A session left alone for longer than its lease is gone within {SETTLE_TIMEOUT_S:g} s, and "
    "its place free again",
    "Note the time of the last call of each session; every few seconds, close those whose lease_s "
    "is over, and count them out "
    "of num_open_sessions. Grant the lease that was asked for.",
)
async def lease_expires(bench: Bench) -> None:
    task = await bench.first_task()
    num_before = (await bench.describe()).capacity.num_open_sessions
    opened = await bench.open(task.task_id, lease_s=_SHORT_LEASE_S)
    is_granted = math.isclose(opened.lease_s, _SHORT_LEASE_S)
    expect(is_granted, f"a lease of {_SHORT_LEASE_S} s, as asked for", f"{opened.lease_s} s")
    await asyncio.sleep(_SHORT_LEASE_S)

    async def is_free() -> bool:
        return bool((await bench.describe()).capacity.num_open_sessions <= num_before)

    expect(
        await poll(is_free, bench.settle_timeout_s),
        "the place of an expired session free again",
        "it still counts in num_open_sessions",
    )
    calling = bench.step(opened.session_id, 0, "look")
    await expect_refusal(calling, grpc.StatusCode.NOT_FOUND, "Step after the lease")


@check(
    "lease.renewed",
    "Every Step starts the lease anew",
    "Set a session's expiry to now plus its lease at each answered Step, repeated ones too.",
)
async def lease_renewed(bench: Bench) -> None:
    script = await bench.script()
    opened = await bench.open(script.task.task_id, lease_s=_RENEWED_LEASE_S)
    index = 0
    for _ in range(2):
        await asyncio.sleep(_STEP_AT_LEASE * _RENEWED_LEASE_S)
        try:
            answer = await bench.step(opened.session_id, index, script.texts[index])
        except Refusal as refusal:
            raise FailedCheck(
                f"an answer {_STEP_AT_LEASE:.0%} of the lease after the last call", str(refusal)
            ) from refusal
        # An episode that is over is kept by repeating its last step.
        index += 0 if is_over(answer) else 1


@check(
    "capacity.bounded",
    "A full server refuses OpenSession with RESOURCE_EXHAUSTED; a close gives the place back",
    "Count open sessions against max_sessions before building one, and count down in CloseSession.",
)
async def capacity_bounded(bench: Bench) -> None:
    task = await bench.first_task()
    capacity = (await bench.describe()).capacity
    num_free = capacity.max_sessions - capacity.num_open_sessions
    if num_free > MAX_CAPACITY_TRIED:
        raise CheckNotRun(
            f"{num_free} places are free, more than the {MAX_CAPACITY_TRIED} that are tried: "
            f"serve with --capacity {_SMALL_CAPACITY} to run it"
        )

    opened = [await bench.open(task.task_id) for _ in range(num_free)]
    num_open = (await bench.describe()).capacity.num_open_sessions
    expect(
        num_open == capacity.max_sessions,
        f"num_open_sessions {capacity.max_sessions} in a full server",
        num_open,
    )
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    await expect_refusal(bench.open(task.task_id), full, "OpenSession in a full server")
    await bench.close(opened[-1].session_id)

    # A server may free a place a moment after it has answered the close.
    async def is_opened() -> bool:
        try:
            await bench.open(task.task_id)
        except Refusal as refusal:
            expect(refusal.code is full, "a session once one is closed", refusal)
            return False
        return True

    expect(
        await poll(is_opened, bench.settle_timeout_s),
        "a session once one is closed",
        f"RESOURCE_EXHAUSTED for {bench.settle_timeout_s:g} s",
    )


def _new_key() -> str:
    return f"sdar-check-{uuid.uuid4().hex}"


CHECKS = (
    open_answer,
    open_seed,
    open_retry,
    open_key_conflict,
    close_twice,
    lease_expires,
    lease_renewed,
    capacity_bounded,
)
