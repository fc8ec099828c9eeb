"""The checks that run last: errors and open sessions that the other checks left behind."""

from __future__ import annotations

import grpc

from sdar.cli.conformance.bench import Bench, poll
from sdar.cli.conformance.check import check
from sdar.cli.conformance.failure import CheckNotRun, FailedCheck, expect

# These come from the transport or from this client, which know no details.
_UNTYPED = (
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAVAILABLE,
)


@check(
    "errors.typed",
    "Every error of these checks carried a google.rpc.Status with an sdar.v1.ErrorDetail in "
    "grpc-status-details-bin",
    "Pack ErrorDetail{reason, message, fields} into google.rpc.Status.details and send its bytes "
    "as the trailer "
    "grpc-status-details-bin.",
)
async def errors_typed(bench: Bench) -> None:
    refusals = [refusal for refusal in bench.refusals if refusal.code not in _UNTYPED]
    if not refusals:
        raise CheckNotRun("no call was refused")
    for refusal in refusals:
        where = f"{refusal.method} {refusal.code.name}"
        if refusal.detail is None:
            raise FailedCheck(f"{where} with an ErrorDetail", "none in its trailers")
        reason = refusal.detail.reason
        is_upper_snake = reason == reason.upper() and reason.replace("_", "").isalnum()
        expect(is_upper_snake, f"{where}: reason in UPPER_SNAKE", repr(reason))
        expect(
            bool(refusal.detail.message), f"{where}: a message in its ErrorDetail", "an empty one"
        )


@check(
    "sessions.none_left",
    "Once all is closed, no more sessions are open than before the checks (nobody else may use the "
    "server meanwhile)",
    "Give a place back on every way out of a session: CloseSession, expiry, a failed opening, a "
    "failed step.",
)
async def none_left(bench: Bench) -> None:
    num_before = bench.described.capacity.num_open_sessions
    num_open = num_before

    # Sessions that were left to their lease end a while later.
    async def is_settled() -> bool:
        nonlocal num_open
        num_open = (await bench.describe()).capacity.num_open_sessions
        return bool(num_open <= num_before)

    has_settled = await poll(is_settled, bench.settle_timeout_s)
    expect(has_settled, f"num_open_sessions {num_before}, as before the checks", num_open)


CHECKS = (errors_typed, none_left)
