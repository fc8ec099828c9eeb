"""Asks the teacher for skills, which method skill_grpo shows to the student.

Where they stand in a prompt is decided in `services.rollout.prompting`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from sdar.contracts.codec import task_to_proto
from sdar.contracts.errors import UnavailableError
from sdar.contracts.types import Task
from sdar.v1 import teacher_pb2, teacher_pb2_grpc
from sdar.wire.rpc_client import call, connect
from sdar.wire.security import OPEN, Security

_RETRY_S = 0.5


class SkillSource(Protocol):
    """Where a student's skills come from."""

    async def retrieve(self, task: Task, key: str) -> str:
        """Text of the task's skills, empty if there are none. The same key gives the same skills.

        Raises:
            UnavailableError: the source is away.
        """


class GrpcSkillSource:
    """`SkillSource` over `TeacherService.RetrieveSkills`.

    Args:
        patience_s: how long an unreachable teacher is waited for; it may be restarting.
    """

    def __init__(
        self,
        address: str,
        security: Security = OPEN,
        *,
        timeout_s: float = 10.0,
        patience_s: float = 120.0,
    ) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._channel = connect(address, security)
        self._stub = teacher_pb2_grpc.TeacherServiceStub(self._channel)

    async def retrieve(self, task: Task, key: str) -> str:
        request = teacher_pb2.RetrieveSkillsRequest(task=task_to_proto(task), key=key)
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                response = await call(
                    self._stub.RetrieveSkills,
                    request,
                    timeout_s=self._timeout_s,
                    peer=self._address,
                )
                return response.text
            except UnavailableError:
                # A repeat is harmless: the same key gives the same skills.
                if time.monotonic() + _RETRY_S > deadline:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def close(self) -> None:
        await self._channel.close(None)
