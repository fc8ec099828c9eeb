"""The checks of what a server says about itself: description, health, reflection, tasks, names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from sdar.cli.conformance.bench import CALL_TIMEOUT_S, SERVICE_NAME, Bench, Refusal, expect_refusal
from sdar.cli.conformance.check import check
from sdar.cli.conformance.failure import FailedCheck, expect
from sdar.v1 import environment_pb2, task_pb2

UNKNOWN_NAME = "sdar-check-nobody-has-this-name"

_NUM_PAGES_COMPARED = 3
_MOST_ON_SMALL_PAGE = 7


@check(
    "describe.complete",
    "Describe gives a name, a version, splits with tasks, limits and capacity that make sense",
    "Fill every field of EnvironmentDescription; the limits are those that the server enforces.",
)
async def describe_complete(bench: Bench) -> None:
    described = await bench.describe()
    expect(bool(described.version), "a version", "an empty one")
    _expect_splits(described.splits)
    _expect_limits(described.limits)
    _expect_capacity(described.capacity)


def _expect_splits(splits: Sequence[environment_pb2.Split]) -> None:
    names = [split.name for split in splits]
    are_named = bool(names) and all(names)
    are_different = len(set(names)) == len(names)
    expect(are_named and are_different, "splits with names of their own", names)
    has_tasks = any(split.num_tasks for split in splits)
    expect(has_tasks, "at least one split with tasks", "num_tasks 0 everywhere")


def _expect_limits(limits: environment_pb2.EnvironmentLimits) -> None:
    expect(limits.max_turns >= 1, "limits.max_turns of at least 1", limits.max_turns)
    expect(limits.max_text_bytes >= 1, "limits.max_text_bytes of at least 1", limits.max_text_bytes)
    expect(_is_time(limits.step_timeout_s), "limits.step_timeout_s above 0", limits.step_timeout_s)
    expect(
        _is_time(limits.default_lease_s), "limits.default_lease_s above 0", limits.default_lease_s
    )
    leases = f"{limits.max_lease_s} under {limits.default_lease_s}"
    expect(
        limits.max_lease_s >= limits.default_lease_s,
        "limits.max_lease_s of at least default_lease_s",
        leases,
    )


def _expect_capacity(capacity: environment_pb2.EnvironmentCapacity) -> None:
    expect(capacity.max_sessions >= 1, "capacity.max_sessions of at least 1", capacity.max_sessions)
    room = f"{capacity.num_open_sessions} open of {capacity.max_sessions}"
    expect(
        capacity.num_open_sessions <= capacity.max_sessions,
        "no more sessions open than there is room for",
        room,
    )


def _is_time(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds > 0


@check(
    "describe.all",
    "Describe without a name gives every environment once",
    "Answer DescribeRequest{} with all environments that are served, each under a name of its own.",
)
async def describe_all(bench: Bench) -> None:
    response = await bench.call("Describe", environment_pb2.DescribeRequest())
    names = [one.name for one in response.environments]
    expect(
        bench.environment in names and len(set(names)) == len(names),
        f"{bench.environment!r}, every name once",
        names,
    )


@check(
    "health.serving",
    f"gRPC health answers SERVING for the server and for {SERVICE_NAME}",
    "Offer grpc.health.v1.Health and set both names to SERVING once sessions can be opened.",
)
async def health_serving(bench: Bench) -> None:
    stub = health_pb2_grpc.HealthStub(bench.channel)
    for name in ("", SERVICE_NAME):
        try:
            answer = await stub.Check(
                health_pb2.HealthCheckRequest(service=name), timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise FailedCheck(
                f"SERVING for service {name!r}", str(Refusal("Health.Check", error))
            ) from error
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        expect(status == "SERVING", f"SERVING for service {name!r}", status)


@check(
    "reflection.listed",
    f"gRPC reflection lists {SERVICE_NAME}",
    "Register the reflection service (v1 or v1alpha) with the environment service's descriptor.",
)
async def reflection_listed(bench: Bench) -> None:
    refusals = []
    for version in ("v1", "v1alpha"):
        try:
            names = await _reflect(bench.channel, version)
        except grpc.aio.AioRpcError as error:
            # Servers offer the one or the other; only both refusals together fail the check.
            refusals.append(str(Refusal(f"grpc.reflection.{version}", error)))
            continue
        expect(SERVICE_NAME in names, f"{SERVICE_NAME} among the services", sorted(names))
        return
    raise FailedCheck("an answer from grpc.reflection v1 or v1alpha", "; ".join(refusals))


async def _reflect(channel: grpc.aio.Channel, version: str) -> set[str]:
    # By its path: the two versions have the same messages, and the generated stub knows only one of
    # the versions.
    ask: Any = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    names: set[str] = set()
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in ask(iter([request]), timeout=CALL_TIMEOUT_S):
        names |= {service.name for service in answer.list_services_response.service}
    return names


@check(
    "tasks.complete",
    "The pages of ListTasks make up each split: num_tasks tasks, none twice, all in the split",
    "Page through one fixed order; next_page_token is empty on the last page only; num_tasks "
    "counts the same list.",
)
async def tasks_complete(bench: Bench) -> None:
    for split in bench.described.splits:
        tasks = await bench.list_tasks(split.name)
        ids = [task.task_id for task in tasks]
        expect(
            len(ids) == split.num_tasks,
            f"{split.num_tasks} tasks in split {split.name!r}, as described",
            len(ids),
        )
        expect(
            len(set(ids)) == len(ids),
            f"no task twice in the pages of split {split.name!r}",
            _repeated(ids),
        )
        for task in tasks:
            wanted = (bench.environment, split.name)
            got = (task.environment, task.split)
            expect(got == wanted, f"{wanted} on task {task.task_id!r}", got)


@check(
    "tasks.unique",
    "Task ids are not empty, and unique across the splits",
    "Give each task an id of its own; evaluating on a task that is trained on measures nothing.",
)
async def tasks_unique(bench: Bench) -> None:
    splits: dict[str, str] = {}
    for split in bench.described.splits:
        # An id twice in one split is the claim of another check.
        for task_id in {task.task_id for task in await bench.list_tasks(split.name)}:
            expect(bool(task_id), f"ids in split {split.name!r}", "an empty task_id")
            other = splits.setdefault(task_id, split.name)
            expect(
                other == split.name,
                "ids unique across splits",
                f"{task_id!r} in {other!r} and in {split.name!r}",
            )


@check(
    "tasks.stable",
    "Asked again, and in smaller pages, ListTasks gives the same tasks in the same order",
    "Fix the order when the server starts; read the place from page_token alone, and honour "
    "page_size as an upper bound.",
)
async def tasks_stable(bench: Bench) -> None:
    for split in bench.described.splits:
        tasks = await bench.list_tasks(split.name)
        again = await bench.read_pages(split.name)
        expect(
            _ids(tasks) == _ids(again),
            f"the same order of split {split.name!r} twice",
            _first_change(tasks, again),
        )

        # Small enough that there are several pages, where there are several tasks.
        size = max(1, min(len(tasks) // 2, _MOST_ON_SMALL_PAGE))
        small = await _read_small_pages(bench, split.name, size)
        same = _ids(small) == _ids(tasks[: len(small)])
        expect(same, f"pages of {size} to begin like the whole list", _first_change(tasks, small))


async def _read_small_pages(bench: Bench, split: str, size: int) -> list[task_pb2.Task]:
    """The tasks of the first pages of that size."""
    tasks: list[task_pb2.Task] = []
    token = ""
    for _ in range(_NUM_PAGES_COMPARED):
        page = await bench.list_page(split, page_size=size, page_token=token)
        num_tasks = len(page.tasks)
        expect(num_tasks <= size, f"at most page_size {size} tasks on a page", num_tasks)
        tasks.extend(page.tasks)
        token = page.next_page_token
        if not token:
            break
    return tasks


@check(
    "tasks.bad_token",
    "A page_token that the server never gave is refused with INVALID_ARGUMENT",
    "Parse page_token strictly before using it.",
)
async def tasks_bad_token(bench: Bench) -> None:
    split = bench.first_split
    for token in ("not a token", "-1", "9" * 40):
        calling = bench.list_page(split, page_token=token)
        await expect_refusal(
            calling, grpc.StatusCode.INVALID_ARGUMENT, f"ListTasks with page_token {token!r}"
        )


@check(
    "unknown.names",
    "An environment, split or task that does not exist is NOT_FOUND",
    "Look names up before anything else, in Describe, ListTasks and OpenSession, and answer "
    "NOT_FOUND.",
)
async def unknown_names(bench: Bench) -> None:
    task = await bench.first_task()
    split = bench.first_split
    not_found = grpc.StatusCode.NOT_FOUND
    request = environment_pb2.DescribeRequest(environment=UNKNOWN_NAME)
    await expect_refusal(
        bench.call("Describe", request), not_found, "Describe of an unknown environment"
    )
    await expect_refusal(
        bench.list_page(split, environment=UNKNOWN_NAME),
        not_found,
        "ListTasks of an unknown environment",
    )
    await expect_refusal(bench.list_page(UNKNOWN_NAME), not_found, "ListTasks of an unknown split")
    calling = bench.open(task.task_id, environment=UNKNOWN_NAME)
    await expect_refusal(calling, not_found, "OpenSession in an unknown environment")
    await expect_refusal(bench.open(UNKNOWN_NAME), not_found, "OpenSession of an unknown task")
    await expect_refusal(bench.open(""), not_found, "OpenSession without a task")


@check(
    "unknown.session",
    "A Step in a session that does not exist is NOT_FOUND",
    "Look session_id up first; clients take NOT_FOUND for a lost session and play the episode "
    "again.",
)
async def unknown_session(bench: Bench) -> None:
    for session_id in (UNKNOWN_NAME, ""):
        calling = bench.step(session_id, 0, "look")
        await expect_refusal(calling, grpc.StatusCode.NOT_FOUND, f"Step in session {session_id!r}")


def _ids(tasks: list[task_pb2.Task]) -> list[str]:
    return [task.task_id for task in tasks]


def _repeated(ids: list[str]) -> str:
    """The id that comes most often; the text is read only where one comes twice."""
    if not ids:
        return ""
    ((task_id, count),) = Counter(ids).most_common(1)
    return f"{task_id!r} {count} times"


def _first_change(one: list[task_pb2.Task], other: list[task_pb2.Task]) -> str:
    """Where two lists of tasks begin to differ."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a.task_id != b.task_id:
            return f"{a.task_id!r}, then {b.task_id!r} at place {place}"
    return f"{len(one)} tasks, then {len(other)}"


CHECKS = (
    describe_complete,
    describe_all,
    health_serving,
    reflection_listed,
    tasks_complete,
    tasks_unique,
    tasks_stable,
    tasks_bad_token,
    unknown_names,
    unknown_session,
)
