"""Fakes for the gateway's tests, handed over through constructors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdar.config import (
    EnvironmentConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from sdar.contracts.errors import ConflictError, UnavailableError
from sdar.contracts.types import (
    ChatMessage,
    EnvironmentIdentity,
    EpisodeEnd,
    ModelIdentity,
    StopReason,
    Task,
    TaskGroup,
    Trajectory,
    Turn,
    WeightsManifest,
)
from services.gateway.environments import RegisteredEnvironment
from services.gateway.scaling.cluster import Size
from services.gateway.scaling.file import Workload

MODEL = ModelIdentity("tiny", "0" * 16)


def build_config(**training: int) -> RunConfig:
    values = {
        "num_updates": 2,
        "groups_per_update": 2,
        "group_size": 2,
        "max_staleness": 1,
    } | training
    return RunConfig(
        name="test",
        model=ModelConfig(path=Path("model")),
        environment=EnvironmentConfig(name="fake", max_turns=3),
        method=MethodConfig(name="grpo"),
        training=TrainingConfig(**values),
        evaluation=EvaluationConfig(num_tasks=3),
    )


class FakeCatalog:
    """Ten training and five held-out tasks of two types."""

    async def describe(self, name: str, address: str) -> RegisteredEnvironment:
        return RegisteredEnvironment(
            name, address, "1", {"train": 10, "heldout": 5}, "", 3, "A word."
        )

    async def list_tasks(
        self, name: str, address: str, split: str, max_tasks: int | None = None
    ) -> list[Task]:
        number = {"train": 10, "heldout": 5}[split]
        tasks = [
            Task(name, split, f"{split}-{i}", f"type{i % 2}", f"do {i}", i) for i in range(number)
        ]
        return tasks[:max_tasks]


def build_manifest(policy_version: int, num_updates: int | None = None) -> WeightsManifest:
    num_updates = policy_version if num_updates is None else num_updates
    return WeightsManifest(
        "test", policy_version, f"v{policy_version}", (), 0, MODEL, 0.0, num_updates
    )


def play(
    group: TaskGroup,
    policy_version: int,
    *,
    is_success: bool = True,
    last_version: int | None = None,
    reward_components: dict[str, float] | None = None,
) -> Trajectory:
    """The trajectory of an episode with one turn of two tokens."""
    versions = [policy_version, policy_version if last_version is None else last_version]
    turn = Turn(
        0,
        [1, 2],
        (ChatMessage("user", group.task.description),),
        False,
        [3, 4],
        [-0.1, -0.2],
        versions,
        "go",
        StopReason.END_OF_TURN,
        "go",
        True,
        float(is_success),
        reward_components or {},
    )
    return Trajectory(
        run_id=group.run_id,
        group_id=group.group_id,
        trajectory_id=f"{group.group_id}.0.a1",
        attempt=1,
        episode_index=0,
        group_size=group.group_size,
        task=group.task,
        purpose=group.purpose,
        environment=EnvironmentIdentity("fake", "1"),
        model=MODEL,
        sampling=group.sampling,
        turns=(turn,),
        end=EpisodeEnd.TERMINATED,
        is_success=is_success,
        evaluation_id=group.evaluation_id,
    )


class Clock:
    """A time that passes when a test sets it."""

    def __init__(self, now_s: float = 1_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class FakeCluster:
    """Workloads by name, with versions as Kubernetes has them. `fault` is raised by every read."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = dict(sizes)
        self.events: list[tuple[str, str, str]] = []
        self.fault: Exception | None = None
        self.before_resize: Callable[[], None] = lambda: None
        self._versions = dict.fromkeys(sizes, 1)

    def set(self, name: str, replicas: int) -> None:
        """Somebody else acts."""
        self.sizes[name] = replicas
        self._versions[name] += 1

    async def read(self, workload: Workload) -> Size:
        if self.fault:
            raise self.fault
        if workload.name not in self.sizes:
            raise UnavailableError(f"There is no {workload.name}.")
        return Size(self.sizes[workload.name], str(self._versions[workload.name]), "uid")

    async def resize(self, workload: Workload, size: Size, replicas: int) -> None:
        self.before_resize()
        if size.version != str(self._versions[workload.name]):
            raise ConflictError(f"{workload.name} was changed.")
        self.set(workload.name, replicas)

    async def leave_event(self, workload: Workload, size: Size, reason: str, message: str) -> None:
        self.events.append((workload.name, reason, message))
