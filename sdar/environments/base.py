"""The base class of an environment, and the records that its methods take and return.

It knows no wire format and no session: those are for `sdar.environments.server` and
`sdar.environments.sessions`.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sdar.contracts.errors import UnknownResourceError
from sdar.contracts.types import EnvironmentIdentity, Task


@dataclass(frozen=True, slots=True)
class Observation:
    """What the agent sees.

    `text` is the user message. `admissible_actions` are the actions that are valid now; they are
    empty if the environment does not list them.
    """

    text: str
    admissible_actions: tuple[str, ...] = ()
    info: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The answer to one response of the agent.

    Attributes:
        reward: scalar of this step, which training sees; finite.
        reward_components: named numbers that explain it, for people and evaluations: its parts, or
            a benchmark's own score.
        terminated: the environment's own rule ended the episode; `truncated`: the turn limit cut
            it. At most one is true.
        action: what the environment read out of the agent's text. An invalid action still uses a
            turn.
        is_success: the task is solved; meaningful once the episode is over, False before.
    """

    observation: Observation
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    action: str = ""
    is_action_valid: bool = True
    is_success: bool = False
    reward_components: dict[str, float] = field(default_factory=dict)
    info: dict[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.terminated or self.truncated


@dataclass(frozen=True, slots=True)
class EnvironmentDescription:
    """What an agent, a scheduler and a server need to know before the first episode.

    `splits` is the number of tasks by the split's name.
    """

    identity: EnvironmentIdentity
    splits: dict[str, int]
    instructions: str
    action_format: str
    max_turns: int
    is_blocking: bool


class Environment(ABC):
    """Plays one episode at a time: `reset` starts one of a task, `step` answers one response.

    Subclass it, fill the attributes, and implement `reset` and `step`. The server makes one
    instance per session and one more per worker process for the task list, all with the same
    keyword arguments: the options a user gives (strings, numbers and booleans). Construction must
    be cheap: share heavy data between the instances of a process (a module-level cache).

    Attributes, on the class or set by the constructor:
        name, version: the identity stamped on every trajectory. Raise the version whenever a
            reward could differ.
        splits: names of disjoint task lists. Evaluation reads a list from its start, so any prefix
            should be balanced.
        tasks: the tasks of every split, for environments that can name them all; others override
            `list_tasks`.
        instructions: the system message, or "" for none.
        action_format: one sentence on how to write an action.
        max_turns: the environment truncates an episode here.
        is_blocking: calls wait for something outside the process (a server, a disk), so those of
            different episodes run at the same time, in threads. Otherwise a worker plays all its
            episodes in one thread, one call after another.
    """

    name: str
    version: str
    splits: tuple[str, ...] = ("train", "heldout")
    tasks: Mapping[str, Sequence[Task]] = {}
    instructions: str = ""
    action_format: str = ""
    max_turns: int
    is_blocking: bool = False

    def describe(self) -> EnvironmentDescription:
        return EnvironmentDescription(
            identity=EnvironmentIdentity(self.name, self.version),
            splits={split: len(self.list_tasks(split)) for split in self.splits},
            instructions=self.instructions,
            action_format=self.action_format,
            max_turns=self.max_turns,
            is_blocking=self.is_blocking,
        )

    def list_tasks(self, split: str) -> Sequence[Task]:
        """All tasks of a split, in an order that never changes.

        Raises:
            UnknownResourceError: there is no such split.
        """
        if split not in self.splits:
            raise self.unknown_split(split)
        return self.tasks[split]

    def get_task(self, task_id: str) -> Task:
        """The task of that id, from any split. Raises UnknownResourceError."""
        task = self._tasks_by_id.get(task_id)
        if task is None:
            raise self.unknown_task(task_id)
        return task

    @cached_property
    def _tasks_by_id(self) -> dict[str, Task]:
        tasks = itertools.chain.from_iterable(map(self.list_tasks, self.splits))
        return {task.task_id: task for task in tasks}

    @abstractmethod
    def reset(self, task_id: str, seed: int) -> Observation:
        """Start an episode over.

        The same task and seed give the same episode for the same actions, on every machine.

        Raises UnknownResourceError for a task that is not there, CapacityError if something outside
        has no room for it now.
        """

    @abstractmethod
    def step(self, text: str) -> StepResult:
        """Answer the agent's raw text. Called only between `reset` and the end of an episode.

        Text that holds no usable action is an invalid action, never an exception: exceptions mean
        that the environment broke.
        """

    def close(self) -> None:  # noqa: B027 - an optional hook: most environments hold nothing
        """Give back whatever the episode holds. Called once, also after a failure.

        May be called while a blocking `reset` or `step` hangs in another thread: end what it waits
        for.
        """

    def unknown_task(self, task_id: str) -> UnknownResourceError:
        return UnknownResourceError(
            f"Environment {self.name} {self.version} has no task {task_id!r}. List the tasks of "
            f"{' or '.join(self.splits)}.",
            environment=self.name,
            task_id=task_id,
        )

    def unknown_split(self, split: str) -> UnknownResourceError:
        return UnknownResourceError(
            f"Environment {self.name} {self.version} has no split {split!r}. Use one of "
            f"{', '.join(self.splits)}.",
            environment=self.name,
            split=split,
        )
