"""TeacherService over gRPC: scores trajectories on demand, and hands out skills."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import structlog

from sdar.contracts.codec import task_from_proto, teacher_score_to_proto, trajectory_from_proto
from sdar.contracts.errors import SdarError
from sdar.contracts.types import TeacherScore
from sdar.v1 import teacher_pb2, teacher_pb2_grpc
from sdar.wire.answers import KeptAnswers
from services.teacher.skills import format_skills
from services.teacher.teacher import Teacher

SERVICE_NAME = "sdar.v1.TeacherService"

log = structlog.get_logger()

_MAX_ANSWERS = 256
"""Answers that are being made or are kept for callers that repeat a request id."""


class TeacherServicer(teacher_pb2_grpc.TeacherServiceServicer):
    """Translates; errors pass as they are, the server turns them into statuses."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._answers: KeptAnswers[TeacherScore] = KeptAnswers(_MAX_ANSWERS)

    async def Score(
        self, request: teacher_pb2.ScoreRequest, context: Any
    ) -> teacher_pb2.ScoreResponse:
        """A repeated request id gets the first one's answer, even while that is being made."""
        score = await self._answers.get_or_make(
            request.request_id, request, functools.partial(self._score, request)
        )
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

    async def _score(self, request: teacher_pb2.ScoreRequest) -> TeacherScore:
        trajectory = trajectory_from_proto(request.trajectory)
        scoring = self._teacher.score([trajectory], request.min_teacher_version)
        # Shielded: the teacher's threads go on when a caller hangs up, and the next call must wait
        # for them.
        (outcome,) = await asyncio.shield(asyncio.create_task(scoring))
        if isinstance(outcome, SdarError):
            raise outcome
        assert outcome.score is not None  # The teacher attaches one to everything it returns.
        log.info(
            "scored_on_demand",
            request_id=request.request_id,
            trajectory_id=trajectory.trajectory_id,
        )
        return outcome.score
