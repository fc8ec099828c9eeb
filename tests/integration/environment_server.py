"""What tests of environment servers share: the five calls, and a running server."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from sdar.environments.registry import load_environment
from sdar.environments.server import serve_environments
from sdar.environments.sessions import SessionLimits, SessionManager
from sdar.environments.workers import WorkerHost
from sdar.process.telemetry import Health
from sdar.v1 import environment_pb2 as pb
from sdar.v1 import environment_pb2_grpc
from sdar.wire.rpc_client import call, connect

TASK_ID = "polish-apple-drawer-desk"


class Client:
    """The five calls, with the errors of `sdar.contracts.errors`."""

    def __init__(self, channel, address) -> None:
        self.channel, self.address = channel, address
        self.stub = environment_pb2_grpc.EnvironmentServiceStub(channel)

    async def describe(self, environment=""):
        return await call(
            self.stub.Describe, pb.DescribeRequest(environment=environment), timeout_s=5
        )

    async def list_tasks(self, split, **fields):
        request = pb.ListTasksRequest(split=split, **{"environment": "household", **fields})
        return await call(self.stub.ListTasks, request, timeout_s=5)

    async def open(self, task_id=TASK_ID, environment="household", **fields):
        request = pb.OpenSessionRequest(environment=environment, task_id=task_id, **fields)
        return await call(self.stub.OpenSession, request, timeout_s=5)

    async def step(self, session_id, step_index, text):
        request = pb.StepRequest(session_id=session_id, step_index=step_index, text=text)
        return await call(self.stub.Step, request, timeout_s=5)

    async def close(self, session_id):
        return await call(
            self.stub.CloseSession, pb.CloseSessionRequest(session_id=session_id), timeout_s=5
        )


@asynccontextmanager
async def serving(limits: SessionLimits | None = None, host: WorkerHost | None = None, **options):
    """A client of a running server (the household by default), its stop event, its health."""
    host = host or WorkerHost({"household": load_environment("household")}, num_workers=1)
    stopping, health = asyncio.Event(), Health()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(
        serve_environments(
            stopping,
            sessions=SessionManager(host, limits or SessionLimits()),
            host="127.0.0.1",
            port=0,
            health=health,
            on_ready=port.set_result,
            **options,
        )
    )
    await asyncio.wait((server, port), return_when=asyncio.FIRST_COMPLETED)
    address = f"127.0.0.1:{await port}"
    async with connect(address) as channel:
        yield Client(channel, address), stopping, health
        stopping.set()
        await server
