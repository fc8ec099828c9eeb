"""TeacherService over gRPC: scores trajectories on demand, and hands out skills."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections import OrderedDict
from typing import Any

import structlog

from sdar.contracts.codec import task_from_proto, teacher_score_to_proto, trajectory_from_proto
from sdar.contracts.errors import ConflictError, InvalidInputError, SdarError
from sdar.contracts.types import TeacherScore, Trajectory
from sdar.v1 import teacher_pb2, teacher_pb2_grpc
from services.teacher.skills import format_skills
from services.teacher.teacher import Teacher

SERVICE_NAME = "sdar.v1.TeacherService"
MAX_REQUEST_ID_CHARACTERS = 128

log = structlog.get_logger()

_MAX_ANSWERS = 256
"""Answers kept for callers that repeat a request id."""


class TeacherServicer(teacher_pb2_grpc.TeacherServiceServicer):
    """Translates; errors pass as they are, the server turns them into statuses."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._answers: OrderedDict[str, tuple[bytes, asyncio.Task[TeacherScore]]] = OrderedDict()

    async def Score(
        self, request: teacher_pb2.ScoreRequest, context: Any
    ) -> teacher_pb2.ScoreResponse:
        """A repeated request id gets the first one's answer, even while that is being made."""
        # Shielded: a caller that hangs up and repeats finds the answer it missed.
        score = await asyncio.shield(self._start_or_join(request))
        return teacher_pb2.ScoreResponse(
            request_id=request.request_id, score=teacher_score_to_proto(score)
        )

    async def RetrieveSkills(
        self, request: teacher_pb2.RetrieveSkillsRequest, context: Any
    ) -> teacher_pb2.RetrieveSkillsResponse:
        retrieval = await self._teacher.retrieve(task_from_proto(request.task), request.key)
        return teacher_pb2.RetrieveSkillsResponse(
            skill_ids=retrieval.skill_ids,
            num_specific_skills=len(retrieval.specific),
            text=format_skills(retrieval.skills),
            skill_library_hash=self._teacher.contexts.retriever.skill_library.content_hash,
            template_hash=self._teacher.contexts.chat.template_hash,
            retrieval=retrieval.label,
        )

    def _start_or_join(self, request: teacher_pb2.ScoreRequest) -> asyncio.Task[TeacherScore]:
        if len(request.request_id) > MAX_REQUEST_ID_CHARACTERS:
            raise InvalidInputError(
                f"request_id has {len(request.request_id)} characters, the limit is "
                f"{MAX_REQUEST_ID_CHARACTERS}. Shorten it."
            )
        # Compared by hash: the answers kept must not keep their requests in memory too.
        content = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        known = self._answers.get(request.request_id) if request.request_id else None
        if known is not None and known[0] != content:
            raise _build_conflict(request.request_id)
        if known is not None and not _has_failed(known[1]):
            return known[1]
        trajectory = trajectory_from_proto(request.trajectory)
        task = asyncio.create_task(
            self._score(trajectory, request.min_teacher_version, request.request_id)
        )
        # A request without an id is not kept: nobody can ask for its answer again.
        if request.request_id:
            task.add_done_callback(functools.partial(self._drop_failed, request.request_id))
            self._answers[request.request_id] = (content, task)
            while len(self._answers) > _MAX_ANSWERS:
                self._answers.popitem(last=False)
        return task

    def _drop_failed(self, request_id: str, task: asyncio.Task[Any]) -> None:
        """A failure is no answer to keep: it would hold the whole request, in its traceback."""
        known = self._answers.get(request_id)
        if known is not None and known[1] is task and _has_failed(task):
            del self._answers[request_id]

    async def _score(
        self, trajectory: Trajectory, min_teacher_version: int, request_id: str
    ) -> TeacherScore:
        (outcome,) = await self._teacher.score([trajectory], min_teacher_version)
        if isinstance(outcome, SdarError):
            raise outcome
        assert outcome.score is not None  # The teacher attaches one to everything it returns.
        log.info("scored_on_demand", request_id=request_id, trajectory_id=trajectory.trajectory_id)
        return outcome.score


def _build_conflict(request_id: str) -> ConflictError:
    return ConflictError(
        f"Request id {request_id!r} was used for another request. Choose a new one for each "
        "request.",
        request_id=request_id,
    )


def _has_failed(task: asyncio.Task[TeacherScore]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
