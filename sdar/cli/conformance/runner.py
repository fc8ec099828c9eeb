"""The order of the checks and the verdict of each: passed, failed with its reason, or not run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio

from sdar.cli.conformance import aftermath, discovery, episodes, sessions, steps
from sdar.cli.conformance.bench import SERVICE_NAME, SETTLE_TIMEOUT_S, Bench, Refusal
from sdar.cli.conformance.check import Check, Outcome, Verdict
from sdar.cli.conformance.failure import CheckNotRun, FailedCheck
from sdar.contracts.errors import ConfigurationError, SdarError, UnavailableError
from sdar.v1 import environment_pb2, environment_pb2_grpc
from sdar.wire.rpc_client import call, connect
from sdar.wire.security import OPEN, Security

ALL_CHECKS: tuple[Check, ...] = (
    *discovery.CHECKS,
    *sessions.CHECKS,
    *steps.CHECKS,
    *episodes.CHECKS,
    *aftermath.CHECKS,
)

_FIRST_CALL_TIMEOUT_S = 10.0
_CHECK_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Report:
    """The verdicts on one environment of one server."""

    address: str
    environment: str
    version: str
    is_action_known: bool
    outcomes: tuple[Outcome, ...]
    seconds: float

    def count(self, verdict: Verdict) -> int:
        return sum(outcome.verdict is verdict for outcome in self.outcomes)

    @property
    def is_passed(self) -> bool:
        """Nothing failed; checks that could not be run are counted apart."""
        return self.count(Verdict.FAIL) == 0


async def check_server(
    address: str,
    environment: str = "",
    security: Security = OPEN,
    *,
    checks: Sequence[Check] = ALL_CHECKS,
    settle_timeout_s: float = SETTLE_TIMEOUT_S,
    on_begin: Callable[[Check], None] = lambda check: None,
) -> Report:
    """Try every check against the environment at `address`, one after another.

    Args:
        environment: its name; may be left out where the server has only one.
        settle_timeout_s: how long a place that should be free again is waited for.

    Raises:
        ConfigurationError: nobody answers there, or the server has no such environment.
    """
    began_s = time.monotonic()
    async with connect(address, security, is_sticky=True) as channel:
        bench = Bench(
            channel, await find_environment(channel, address, environment), settle_timeout_s
        )
        outcomes = [await _try(_FIND_ACTIONS, bench)]
        for check in checks:
            on_begin(check)
            outcomes.append(await _try(check, bench))
    # Finding actions is a means; as a verdict it counts only where it breaks.
    shown = tuple(
        outcome
        for outcome in outcomes
        if outcome.check is not _FIND_ACTIONS or outcome.verdict is Verdict.FAIL
    )
    seconds = time.monotonic() - began_s
    return Report(
        address,
        bench.described.name,
        bench.described.version,
        bench.is_action_known,
        shown,
        seconds,
    )


async def find_environment(
    channel: grpc.aio.Channel, address: str, name: str
) -> environment_pb2.EnvironmentDescription:
    """What the server at `address` says of the environment, or of its only one. Raises
    ConfigurationError.
    """
    stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
    try:
        response: environment_pb2.DescribeResponse = await call(
            stub.Describe,
            environment_pb2.DescribeRequest(),
            timeout_s=_FIRST_CALL_TIMEOUT_S,
            peer=address,
        )
    except UnavailableError as error:
        raise ConfigurationError(
            f"No environment server answers at {address}. Start one with `sdar env serve NAME`, or "
            "correct HOST:PORT. "
            f"What came back: {error.message}"
        ) from error
    except SdarError as error:
        raise ConfigurationError(
            f"{address} does not answer {SERVICE_NAME}.Describe: {error.message}"
        ) from error
    by_name = {one.name: one for one in response.environments}
    if not name and len(by_name) == 1:
        return next(iter(by_name.values()))
    if name not in by_name:
        asked = (
            f"--environment {name!r} is not one of them"
            if name
            else "name one of them with --environment"
        )
        raise ConfigurationError(
            f"{address} serves {', '.join(by_name) or 'no environment'}; {asked}."
        )
    return by_name[name]


async def _try(check: Check, bench: Bench) -> Outcome:
    began_s = time.monotonic()
    found = (Verdict.PASS, "", "")  # the verdict, what was expected, what came
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            await check.run(bench)
    except FailedCheck as failed:
        found = (Verdict.FAIL, failed.expected, failed.got)
    except Refusal as refusal:
        found = (Verdict.FAIL, "an answer", str(refusal))
    except TimeoutError:
        found = (Verdict.FAIL, f"an end within {_CHECK_TIMEOUT_S:g} s", "none")
    except CheckNotRun as reason:
        found = (Verdict.NOT_RUN, "", str(reason))
    await bench.close_opened()
    verdict, expected, got = found
    return Outcome(check, verdict, time.monotonic() - began_s, expected, got)


_FIND_ACTIONS = Check(
    "episode.begins",
    "An episode of the first task can be opened, stepped once and closed",
    "Play OpenSession, Step and CloseSession of the first task of the first split by hand: sdar "
    "env play HOST:PORT.",
    Bench.find_action_form,
)
