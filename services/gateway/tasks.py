"""The run's tasks: their lists, where they are played, and the groups made of them."""

from __future__ import annotations

import dataclasses

import structlog

from sdar.config import RunConfig
from sdar.contracts.errors import CorruptionError
from sdar.contracts.types import Purpose, Task, TaskGroup

from .environments import EnvironmentCatalog, RegisteredEnvironment, TrainingOrder
from .evaluation import Evaluation
from .state import GatewayState

log = structlog.get_logger()


class TaskSource:
    """What there is to play, and where.

    Attributes:
        environments: those that were described, by name.
        training: None until the lists are loaded.
        heldout: the tasks of evaluations, in order; an evaluation names them by their index. As
            many as the longest evaluation of the run has, which may have been begun under a
            configuration that wanted more of them.
    """

    def __init__(
        self, config: RunConfig, catalog: EnvironmentCatalog, default_address: str
    ) -> None:
        self.environments: dict[str, RegisteredEnvironment] = {}
        self.training: TrainingOrder | None = None
        self.heldout: list[Task] = []
        self._config = config
        self._catalog = catalog
        self._default_address = config.environment.address or default_address

    async def describe(self, name: str, address: str) -> RegisteredEnvironment:
        """Ask the server at `address` for environment `name`, and know it from now on.

        Raises CorruptionError if it is the run's own and lacks one of the run's splits.
        """
        found = await self._catalog.describe(name, address)
        environment = self._config.environment
        for split in (environment.train_split, environment.evaluation_split):
            if name == environment.name and split not in found.splits:
                raise CorruptionError(
                    f"Environment {name} at {address} has no split {split!r}, it has "
                    f"{sorted(found.splits)}. "
                    "Set environment.train_split and evaluation_split to those."
                )
        self.environments[name] = found
        return found

    async def load(self, state: GatewayState) -> None:
        """Load the lists. Raises UnavailableError while the environment does not answer."""
        environment = self._config.environment
        address = self.locate(state, environment.name)
        await self.describe(environment.name, address)
        tasks = await self._list(address, environment.train_split)
        begun = (evaluation.num_tasks for evaluation in state.evaluations)
        wanted = max(self._config.evaluation.num_tasks, max(begun, default=0))
        self.heldout = await self._list(address, environment.evaluation_split, wanted)
        if len(self.heldout) < wanted:
            log.warning(
                "evaluation_list_short",
                wanted=wanted,
                got=len(self.heldout),
                split=environment.evaluation_split,
            )
        self.training = TrainingOrder(tasks, self._config.seed)
        log.info("tasks_listed", num_train=len(tasks), num_heldout=len(self.heldout))

    def get_heldout(self, index: int) -> Task:
        """A task of an evaluation. Raises CorruptionError if the environment lists it no more."""
        if index >= len(self.heldout):
            environment = self._config.environment
            raise CorruptionError(
                f"An evaluation waits for held-out task {index}, but environment "
                f"{environment.name} lists only {len(self.heldout)} in "
                f"{environment.evaluation_split}. Serve the tasks that the run began with."
            )
        return self.heldout[index]

    def locate(self, state: GatewayState, name: str) -> str:
        """Where an environment is: as registered while the run went on, else the default address.

        Only registrations are remembered: after a restart the run's own environment may listen
        elsewhere.
        """
        return state.environments.get(name, self._default_address)

    def build_training_group(
        self, state: GatewayState, group_id: str, task: Task, policy_version: int
    ) -> TaskGroup:
        """The group that plays a training task, admitted under `policy_version`."""
        config = self._config
        return TaskGroup(
            run_id=config.name,
            group_id=group_id,
            task=task,
            group_size=config.training.group_size,
            purpose=Purpose.TRAIN,
            admitted_version=policy_version,
            sampling=config.train_sampling,
            max_turns=config.environment.max_turns,
            environment_address=self.locate(state, task.environment),
        )

    def build_evaluation_group(
        self, state: GatewayState, evaluation: Evaluation, index: int
    ) -> TaskGroup:
        """The group of one episode that plays held-out task `index` for an evaluation."""
        config = self._config
        task = self.get_heldout(index)
        return TaskGroup(
            run_id=config.name,
            group_id=evaluation.group_id(index),
            task=task,
            group_size=1,
            purpose=Purpose.EVALUATION,
            admitted_version=evaluation.policy_version,
            sampling=config.evaluation_sampling(is_greedy=evaluation.is_greedy),
            max_turns=config.environment.max_turns,
            environment_address=self.locate(state, task.environment),
            evaluation_id=evaluation.evaluation_id,
        )

    async def _list(self, address: str, split: str, max_tasks: int | None = None) -> list[Task]:
        """Tasks of a split, under the name that the environment is served by.

        A class that is given by its path may call itself otherwise in them.
        """
        name = self._config.environment.name
        tasks = await self._catalog.list_tasks(name, address, split, max_tasks)
        return [
            task if task.environment == name else dataclasses.replace(task, environment=name)
            for task in tasks
        ]
