"""GatewayService over gRPC: the same registry and status as the HTTP API.

For programs that already speak gRPC.
"""

from __future__ import annotations

from sdar.v1 import environment_pb2, gateway_pb2, gateway_pb2_grpc

from .environments import RegisteredEnvironment
from .scheduler import Scheduler
from .state import RunPhase

_STATES = {
    RunPhase.STARTING: gateway_pb2.RUN_STATE_STARTING,
    RunPhase.RUNNING: gateway_pb2.RUN_STATE_RUNNING,
    RunPhase.PAUSED: gateway_pb2.RUN_STATE_PAUSED,
    RunPhase.STOPPING: gateway_pb2.RUN_STATE_STOPPING,
    RunPhase.FINISHED: gateway_pb2.RUN_STATE_FINISHED,
    RunPhase.FAILED: gateway_pb2.RUN_STATE_FAILED,
}


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """Errors raised here become typed gRPC statuses in the server's interceptor."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def RegisterEnvironment(
        self, request: gateway_pb2.RegisterEnvironmentRequest, context: object
    ) -> gateway_pb2.RegisterEnvironmentResponse:
        found = await self._scheduler.register_environment(request.name, request.address)
        return gateway_pb2.RegisterEnvironmentResponse(environment=_to_proto(found))

    async def ListEnvironments(
        self, request: gateway_pb2.ListEnvironmentsRequest, context: object
    ) -> gateway_pb2.ListEnvironmentsResponse:
        environments = [_to_proto(found) for found in self._scheduler.environments.values()]
        return gateway_pb2.ListEnvironmentsResponse(environments=environments)

    async def GetRunStatus(
        self, request: gateway_pb2.GetRunStatusRequest, context: object
    ) -> gateway_pb2.GetRunStatusResponse:
        scheduler = self._scheduler
        return gateway_pb2.GetRunStatusResponse(
            run_id=scheduler.config.name,
            state=_STATES[scheduler.state.phase],
            policy_version=scheduler.policy.version,
            target_policy_version=scheduler.config.training.num_updates,
            num_groups=scheduler.ledger.counts(),
            reason=scheduler.detail,
        )


def _to_proto(found: RegisteredEnvironment) -> gateway_pb2.RegisteredEnvironment:
    description = environment_pb2.EnvironmentDescription(
        name=found.name,
        version=found.version,
        splits=[
            environment_pb2.Split(name=name, num_tasks=number)
            for name, number in found.splits.items()
        ],
        instructions=found.instructions,
        limits=environment_pb2.EnvironmentLimits(max_turns=found.max_turns),
    )
    return gateway_pb2.RegisteredEnvironment(
        name=found.name, address=found.address, description=description
    )
