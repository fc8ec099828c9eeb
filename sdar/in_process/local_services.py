"""Environments and skills for a run in one process, called directly where services use gRPC.

Sessions, idempotency, limits and checks of what an environment answers are the envs service's own;
only the wire is missing.
"""

from __future__ import annotations

import functools

from sdar.contracts.errors import (
    EnvironmentFailedError,
    InvalidInputError,
    SdarError,
    UnavailableError,
)
from sdar.contracts.types import Task
from sdar.environments.sessions import SessionManager
from services.gateway.environments import RegisteredEnvironment
from services.rollout.environment_client import EnvironmentProfile, Session, StepOutcome
from services.teacher.retrieval import Retriever
from services.teacher.skills import format_skills


class LocalEnvironmentCatalog:
    """The gateway's `EnvironmentCatalog`; addresses mean nothing here."""

    def __init__(self, sessions: SessionManager) -> None:
        self._sessions = sessions

    async def describe(self, name: str, address: str) -> RegisteredEnvironment:
        description = self._sessions.describe(name)
        version = description.identity.version
        splits = description.splits
        return RegisteredEnvironment(
            name, address, version, splits, description.instructions, description.max_turns
        )

    async def list_tasks(
        self, name: str, address: str, split: str, max_tasks: int | None = None
    ) -> list[Task]:
        return list(await self._sessions.list_tasks(name, split, 0, max_tasks))


class LocalEnvironmentClient:
    """The rollout worker's `EnvironmentClient`, and an `EnvironmentDirectory` of it alone."""

    def __init__(self, sessions: SessionManager) -> None:
        self._sessions = sessions
        self.num_waiting = 0

    def get(self, address: str) -> LocalEnvironmentClient:
        return self

    async def close(self) -> None:
        """Sessions belong to their manager."""

    async def describe(self, environment: str) -> EnvironmentProfile:
        return self._profile(environment)

    async def open_session(self, task: Task, idempotency_key: str) -> Session:
        try:
            opened = await self._sessions.open(
                task.environment, task.task_id, task.seed, idempotency_key=idempotency_key
            )
        # As the client over gRPC does: all but these count as the environment's failure.
        except (InvalidInputError, UnavailableError):
            raise
        except SdarError as error:
            raise EnvironmentFailedError(
                f"Environment {task.environment} opened no session: {error}"
            ) from error
        return Session(
            opened.session_id, opened.observation.text, opened.observation.admissible_actions
        )

    async def step(self, session_id: str, step_index: int, text: str) -> StepOutcome:
        result = await self._sessions.step(session_id, step_index, text)
        return StepOutcome(
            observation=result.observation.text,
            reward=result.reward,
            reward_components=dict(result.reward_components),
            is_terminated=result.terminated,
            is_truncated=result.truncated,
            action=result.action,
            is_action_valid=result.is_action_valid,
            is_success=result.is_success,
            admissible_actions=result.observation.admissible_actions,
        )

    async def close_session(self, session_id: str) -> None:
        self._sessions.close(session_id)

    @functools.cache  # noqa: B019 - one client lives as long as its run
    def _profile(self, environment: str) -> EnvironmentProfile:
        description = self._sessions.describe(environment)
        return EnvironmentProfile(
            description.identity, description.instructions, description.action_format
        )


class LocalSkills:
    """The rollout worker's `SkillSource`: the teacher service's own retrieval."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever

    async def retrieve(self, task: Task, key: str) -> str:
        await self._retriever.prepare(task, key)
        return str(format_skills(self._retriever.retrieve(task, key).skills))
