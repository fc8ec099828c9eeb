"""What environments offer: their descriptions and task lists, asked of their servers over gRPC."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Protocol

from sdar.contracts import codec
from sdar.contracts.errors import ConfigurationError, InvalidInputError, UnknownResourceError
from sdar.contracts.types import Task
from sdar.v1 import environment_pb2, environment_pb2_grpc
from sdar.wire.rpc_client import call, connect
from sdar.wire.security import OPEN, Security

ADDRESS_PATTERN = r"^[A-Za-z0-9._-]+:[0-9]{1,5}$"
"""HOST:PORT, and nothing else that gRPC takes for a target: who registers an environment must not
be able to choose a local socket.
"""
MAX_NAME_CHARACTERS = 128

_PAGE_SIZE = 1000
_DEADLINE_S = 30.0
"""Of one call; after it the environment counts as unavailable."""


@dataclass(frozen=True, slots=True)
class RegisteredEnvironment:
    """An environment as its server describes it. `splits` has the number of tasks of each."""

    name: str
    address: str
    version: str
    splits: dict[str, int]
    instructions: str
    max_turns: int
    action_format: str = ""


class EnvironmentCatalog(Protocol):
    """Where the gateway learns what an environment offers; the gRPC one asks its server."""

    async def describe(self, name: str, address: str) -> RegisteredEnvironment: ...

    async def list_tasks(
        self, name: str, address: str, split: str, max_tasks: int | None = None
    ) -> list[Task]: ...


class GrpcEnvironmentCatalog:
    """Asks EnvironmentService servers."""

    def __init__(self, security: Security = OPEN) -> None:
        self._security = security

    async def describe(self, name: str, address: str) -> RegisteredEnvironment:
        """What the server at `address` says of environment `name`.

        Raises:
            UnavailableError: nobody answers there. UnknownResourceError: that name isn't served.
        """
        request = environment_pb2.DescribeRequest(environment=name)
        peer = f"environment {name} at {address}"
        async with connect(address, self._security) as channel:
            stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
            answer = await call(stub.Describe, request, timeout_s=_DEADLINE_S, peer=peer)
        found = next((item for item in answer.environments if item.name == name), None)
        if found is None:
            raise UnknownResourceError(
                f"The server at {address} doesn't serve {name!r}. Ask it with Describe."
            )
        splits = {split.name: split.num_tasks for split in found.splits}
        return RegisteredEnvironment(
            name,
            address,
            found.version,
            splits,
            found.instructions,
            found.limits.max_turns,
            found.action_format,
        )

    async def list_tasks(
        self, name: str, address: str, split: str, max_tasks: int | None = None
    ) -> list[Task]:
        """All tasks of a split in the server's fixed order, or its first `max_tasks`."""
        tasks: list[Task] = []
        peer = f"environment {name} at {address}"
        request = environment_pb2.ListTasksRequest(
            environment=name, split=split, page_size=_PAGE_SIZE
        )
        async with connect(address, self._security) as channel:
            stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
            while True:
                page = await call(stub.ListTasks, request, timeout_s=_DEADLINE_S, peer=peer)
                tasks.extend(codec.task_from_proto(task) for task in page.tasks)
                is_enough = max_tasks is not None and len(tasks) >= max_tasks
                if is_enough or not page.next_page_token:
                    return tasks[:max_tasks]
                request.page_token = page.next_page_token


def check_registration(name: str, address: str) -> None:
    """Raises InvalidInputError for what cannot be the name and address of an environment."""
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or not re.fullmatch(ADDRESS_PATTERN, address):
        raise InvalidInputError(
            f"Cannot register environment {name!r} at {address!r}: a name of 1 to "
            f"{MAX_NAME_CHARACTERS} characters and HOST:PORT are needed."
        )


class TrainingOrder:
    """Endless order of training tasks: a seeded permutation of all of them for each epoch.

    It is addressed by position, so that a restarted gateway needs nothing but its cursor.
    """

    def __init__(self, tasks: list[Task], seed: int) -> None:
        if not tasks:
            raise ConfigurationError(
                "The training split is empty. Choose another environment.train_split."
            )
        self._tasks = tasks
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def at(self, position: int) -> Task:
        """The task at `position` of the endless order; the same for the same tasks and seed."""
        epoch, offset = divmod(position, len(self._tasks))
        if epoch != self._epoch:
            self._order = list(range(len(self._tasks)))
            # From seed and epoch alone, so any epoch can be entered without those before it.
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._tasks[self._order[offset]]
