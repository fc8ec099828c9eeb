"""Runs the checks against a server in their order, and gives each its verdict."""

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
        described = await find_environment(channel, address, environment)
        bench = Bench(channel, described, settle_timeout_s)

        outcomes: list[Outcome] = []
        beginning = await _try(_FIND_ACTIONS, bench)
        # Finding actions is a means; as a verdict it counts only where it breaks.
        if beginning.verdict is Verdict.FAIL:
            outcomes.append(beginning)
        for check in checks:
            on_begin(check)
            outcomes.append(await _try(check, bench))

    return Report(
        address,
        described.name,
        described.version,
        bench.is_action_known,
        tuple(outcomes),
        time.monotonic() - began_s,
    )


async def find_environment(
    channel: grpc.aio.Channel, address: str, name: str
) -> environment_pb2.EnvironmentDescription:
    """How the server at `address` describes the environment, or its only one.

    Raises:
        ConfigurationError: nobody answers there, or the server has no such environment.
    """
    by_name = {one.name: one for one in await _describe_all(channel, address)}
    if not name and len(by_name) == 1:
        return next(iter(by_name.values()))
    if name in by_name:
        return by_name[name]

    asked = "name one of them with --environment"
    if name:
        asked = f"--environment {name!r} is not one of them"
    raise ConfigurationError(f"{address} serves {', '.join(by_name) or 'no environment'}; {asked}.")


async def _describe_all(
    channel: grpc.aio.Channel, address: str
) -> Sequence[environment_pb2.EnvironmentDescription]:
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
    return response.environments


async def _try(check: Check, bench: Bench) -> Outcome:
    """Run one check, and close the sessions that it left open."""
    began_s = time.monotonic()
    verdict, expected, got = await _judge(check, bench)
    await bench.close_opened()
    return Outcome(check, verdict, time.monotonic() - began_s, expected, got)


async def _judge(check: Check, bench: Bench) -> tuple[Verdict, str, str]:
    """The verdict, what was expected, and what came."""
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            await check.run(bench)
    except FailedCheck as failed:
        return Verdict.FAIL, failed.expected, failed.got
    except Refusal as refusal:
        return Verdict.FAIL, "an answer", str(refusal)
    except TimeoutError:
        return Verdict.FAIL, f"an end within {_CHECK_TIMEOUT_S:g} s", "none"
    except CheckNotRun as reason:
        return Verdict.NOT_RUN, "", str(reason)
    return Verdict.PASS, "", ""


_FIND_ACTIONS = Check(
    "episode.begins",
    "An episode of the first task can be opened, stepped once and closed",
    "Play OpenSession, Step and CloseSession of the first task of the first split by hand: sdar "
    "env play HOST:PORT.",
    Bench.find_action_form,
)
