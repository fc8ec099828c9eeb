"""Serves environments over gRPC: translates the wire's calls into those of a SessionManager."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from sdar.contracts.codec import task_to_proto
from sdar.contracts.errors import InvalidInputError
from sdar.environments.sessions import SessionManager
from sdar.process.lifecycle import wait_or_stop
from sdar.process.telemetry import Health
from sdar.v1 import environment_pb2, environment_pb2_grpc
from sdar.wire.door import CLIENT
from sdar.wire.rpc_server import RpcServer, RpcService, build_server
from sdar.wire.security import OPEN, Security

MAX_PAGE_SIZE = 1000
_MAX_TOKEN_DIGITS = 12
_MAX_TOKEN_SHOWN = 40
SERVICE_NAME = "sdar.v1.EnvironmentService"

log = structlog.get_logger()


class EnvironmentServicer(environment_pb2_grpc.EnvironmentServiceServicer):
    """Translates; errors pass as they are, the server turns them into statuses."""

    def __init__(self, sessions: SessionManager) -> None:
        self._sessions = sessions

    async def Describe(
        self, request: environment_pb2.DescribeRequest, context: Any
    ) -> environment_pb2.DescribeResponse:
        names = [request.environment] if request.environment else self._sessions.host.names
        described = map(self._describe, names)
        return environment_pb2.DescribeResponse(environments=described)

    async def ListTasks(
        self, request: environment_pb2.ListTasksRequest, context: Any
    ) -> environment_pb2.ListTasksResponse:
        name = request.environment
        split = request.split
        # Of an unknown split there are none; `list_tasks` below refuses it.
        num_tasks = self._sessions.describe(name).splits.get(split, 0)
        page_size = min(request.page_size or MAX_PAGE_SIZE, MAX_PAGE_SIZE)
        start = _parse_page_token(request.page_token, num_tasks)
        end = min(start + page_size, num_tasks)

        tasks = await self._sessions.list_tasks(name, split, start, end)
        return environment_pb2.ListTasksResponse(
            tasks=map(task_to_proto, tasks),
            next_page_token=str(end) if end < num_tasks else "",
        )

    async def OpenSession(
        self, request: environment_pb2.OpenSessionRequest, context: Any
    ) -> environment_pb2.OpenSessionResponse:
        opened = await self._sessions.open(
            request.environment,
            request.task_id,
            request.seed,
            idempotency_key=request.idempotency_key,
            lease_s=request.lease_s,
            client=CLIENT.get(),
        )
        return environment_pb2.OpenSessionResponse(
            session_id=opened.session_id,
            task=task_to_proto(opened.task),
            observation=opened.observation.text,
            admissible_actions=opened.observation.admissible_actions,
            info=opened.observation.info,
            lease_s=opened.lease_s,
        )

    async def Step(
        self, request: environment_pb2.StepRequest, context: Any
    ) -> environment_pb2.StepResponse:
        result = await self._sessions.step(request.session_id, request.step_index, request.text)
        return environment_pb2.StepResponse(
            observation=result.observation.text,
            admissible_actions=result.observation.admissible_actions,
            reward=result.reward,
            reward_components=result.reward_components,
            terminated=result.terminated,
            truncated=result.truncated,
            action=result.action,
            is_action_valid=result.is_action_valid,
            is_success=result.is_success,
            info={**result.observation.info, **result.info},
        )

    async def CloseSession(
        self, request: environment_pb2.CloseSessionRequest, context: Any
    ) -> environment_pb2.CloseSessionResponse:
        self._sessions.close(request.session_id)
        return environment_pb2.CloseSessionResponse()

    def _describe(self, name: str) -> environment_pb2.EnvironmentDescription:
        description = self._sessions.describe(name)
        limits = self._sessions.limits
        splits = [
            environment_pb2.Split(name=split, num_tasks=count)
            for split, count in description.splits.items()
        ]
        return environment_pb2.EnvironmentDescription(
            name=name,
            version=description.identity.version,
            splits=splits,
            instructions=description.instructions,
            action_format=description.action_format,
            limits=environment_pb2.EnvironmentLimits(
                max_turns=description.max_turns,
                max_text_bytes=limits.max_text_bytes,
                step_timeout_s=limits.step_timeout_s,
                default_lease_s=limits.default_lease_s,
                max_lease_s=limits.max_lease_s,
            ),
            capacity=environment_pb2.EnvironmentCapacity(
                max_sessions=limits.max_sessions, num_open_sessions=self._sessions.num_sessions
            ),
        )


async def serve_environments(
    stopping: asyncio.Event,
    *,
    sessions: SessionManager,
    host: str,
    port: int,
    health: Health,
    security: Security = OPEN,
    on_ready: Callable[[int], None] = lambda port: None,
    reap_every_s: float = 1.0,
    drain_s: float = 5.0,
) -> None:
    """Serve the sessions over gRPC until `stopping` is set, then let open episodes finish.

    They have `drain_s` to do so. The server is ready while a worker lives.

    Args:
        sessions: not yet started; closed when this returns.
        port: 0 takes a free one; `on_ready` is called with it once calls are answered.

    Raises:
        ConflictError: the port is taken.
        ConfigurationError: an environment cannot be built, or no token guards a port beyond
            loopback.
    """
    # Bound first: a port that is taken is found before an hour of building an environment.
    server = build_environment_server(sessions, host, port, security)
    try:
        await _start(sessions, stopping, health)
        await server.start()
        log.info(
            "environments_served",
            environments=list(sessions.host.names),
            host=host,
            port=server.port,
        )
        if not stopping.is_set():
            await _report_ready(sessions, server, health)
            on_ready(server.port)

        while not await wait_or_stop(stopping, reap_every_s):
            sessions.reap()
            await _report_ready(sessions, server, health)

        health.mark_unready("draining")
        await server.set_ready(False)
        await _drain(sessions, health, drain_s, reap_every_s)
    finally:
        # The server first: no call may reach a session that is being closed.
        await server.stop(grace_s=1.0)
        await sessions.close_all()


async def _drain(
    sessions: SessionManager, health: Health, drain_s: float, reap_every_s: float
) -> None:
    draining = asyncio.create_task(sessions.drain(drain_s))
    while not draining.done():
        # A drain is long, and its end must not wait for sessions whose callers are gone.
        sessions.reap()
        health.beat()
        await asyncio.wait((draining,), timeout=reap_every_s)
    draining.result()


async def _start(sessions: SessionManager, stopping: asyncio.Event, health: Health) -> None:
    """Start the sessions, or return early on a stop: building an environment may take minutes."""
    starting = asyncio.create_task(sessions.start())
    stopped = asyncio.create_task(stopping.wait())
    try:
        while not (starting.done() or stopped.done()):
            await asyncio.wait(
                (starting, stopped), timeout=1.0, return_when=asyncio.FIRST_COMPLETED
            )
            # Whoever builds is alive, however long it takes.
            health.beat()
        if starting.done():
            starting.result()
    finally:
        for task in (starting, stopped):
            task.cancel()
        await asyncio.gather(starting, stopped, return_exceptions=True)


async def _report_ready(sessions: SessionManager, server: RpcServer, health: Health) -> None:
    health.beat()
    if sessions.host.is_ready and not health.is_ready:
        health.mark_ready()
        await server.set_ready(True)
    elif not sessions.host.is_ready and health.is_ready:
        health.mark_unready("no worker process is alive; one is being started")
        await server.set_ready(False)


def build_environment_server(
    sessions: SessionManager, host: str, port: int, security: Security = OPEN
) -> RpcServer:
    """A bound server, not yet started."""
    add = environment_pb2_grpc.add_EnvironmentServiceServicer_to_server
    service = RpcService(SERVICE_NAME, add, EnvironmentServicer(sessions))
    return build_server(host, port, [service], security)


def _parse_page_token(token: str, num_tasks: int) -> int:
    if not token:
        return 0
    # Its length first: Python takes long to read an integer of a million digits.
    is_number = token.isascii() and token.isdigit() and len(token) <= _MAX_TOKEN_DIGITS
    if not is_number or int(token) > num_tasks:
        raise InvalidInputError(
            f"Unknown page_token {token[:_MAX_TOKEN_SHOWN]!r}. Send the next_page_token of the "
            "page before, or none."
        )
    return int(token)
