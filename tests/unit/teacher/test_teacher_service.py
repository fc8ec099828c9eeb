from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from sdar.contracts import codec
from sdar.contracts.errors import ConflictError, ContractError, StaleError
from sdar.contracts.streams import Stream
from sdar.in_process.memory_bus import MemoryBus
from sdar.v1 import teacher_pb2
from sdar.v1.teacher_pb2_grpc import TeacherServiceStub, add_TeacherServiceServicer_to_server
from sdar.wire.rpc_client import call, connect
from sdar.wire.rpc_server import RpcService, build_server
from services.teacher.context import ContextBuilder
from services.teacher.embedding import SentenceEncoder, SkillIndex
from services.teacher.metrics import TeacherMetrics
from services.teacher.retrieval import Retriever
from services.teacher.teacher import Teacher
from services.teacher.teacher_service import SERVICE_NAME, TeacherServicer
from services.teacher.utility import SkillUtility
from tests.support import until
from tests.unit.teacher.builders import (
    CLEAN,
    LIBRARY,
    FakeScorer,
    build_follower,
    make_manifest,
    play,
)


class SlowScorer(FakeScorer):
    """Scores once `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def score(self, contexts):
        scores = await super().score(contexts)
        await self.go.wait()
        return scores


@pytest.fixture
def bus():
    return MemoryBus({})


@pytest.fixture
def scorer():
    return FakeScorer()


@pytest.fixture
async def stub(chat, bus, scorer):
    """A client of a real server on a free port."""
    contexts = ContextBuilder(chat, Retriever(LIBRARY, kind="task_type", num_skills=3), 1000)
    teacher = Teacher(contexts, scorer, build_follower(bus, scorer, 2), TeacherMetrics(), max_lag=2)
    service = RpcService(
        SERVICE_NAME, add_TeacherServiceServicer_to_server, TeacherServicer(teacher)
    )
    server = build_server("127.0.0.1", 0, [service])
    await server.start()
    channel = connect(f"127.0.0.1:{server.port}")
    yield TeacherServiceStub(channel)
    await channel.close()
    await server.stop(0)


def score(stub, trajectory, **fields):
    request = teacher_pb2.ScoreRequest(trajectory=codec.trajectory_to_proto(trajectory), **fields)
    return call(stub.Score, request, timeout_s=10)


async def test_a_trajectory_is_scored_on_demand(stub, chat):
    trajectory = play(chat)
    response = await score(stub, trajectory, request_id="r1")
    result = codec.teacher_score_from_proto(response.score)
    assert (response.request_id, result.trajectory_id) == ("r1", trajectory.trajectory_id)
    expected = [len(turn.response_token_ids) for turn in trajectory.turns]
    assert [len(values) for values in result.turn_logprobs] == expected
    assert result.skill_ids == ("general", "clean")


async def test_a_version_nobody_published_is_refused_as_stale(stub, chat, bus, scorer):
    with pytest.raises(StaleError, match="version 1 is asked for") as caught:
        await score(stub, play(chat), min_teacher_version=1)
    assert caught.value.fields["grpc_code"] == "FAILED_PRECONDITION"
    await bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(make_manifest(1))])
    response = await score(stub, play(chat), min_teacher_version=1)
    assert response.score.teacher_version == scorer.teacher_version == 1


async def test_a_repeated_request_id_gets_the_first_answer(stub, chat, scorer):
    trajectory = play(chat)
    answers = await asyncio.gather(*(score(stub, trajectory, request_id="same") for _ in range(3)))
    assert scorer.num_calls == 1
    assert {answer.SerializeToString() for answer in answers} == {answers[0].SerializeToString()}


async def test_a_request_id_cannot_name_two_requests(stub, chat):
    await score(stub, play(chat), request_id="same")
    with pytest.raises(ConflictError, match="Choose a new one"):
        await score(stub, play(chat, group_id="other"), request_id="same")


async def test_a_failed_request_may_be_repeated_under_its_id(stub, chat, bus):
    with pytest.raises(StaleError):
        await score(stub, play(chat), request_id="again", min_teacher_version=1)
    await bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(make_manifest(1))])
    assert (
        await score(stub, play(chat), request_id="again", min_teacher_version=1)
    ).score.teacher_version == 1


@pytest.mark.parametrize("request_id", ["", "r"])
async def test_a_score_is_finished_before_the_next_begins_though_its_caller_hung_up(
    chat, bus, request_id
):
    scorer = SlowScorer()
    contexts = ContextBuilder(chat, Retriever(LIBRARY, kind="none", num_skills=3), 1000)
    teacher = Teacher(contexts, scorer, build_follower(bus, scorer, 2), TeacherMetrics(), max_lag=2)
    servicer = TeacherServicer(teacher)
    request = teacher_pb2.ScoreRequest(
        request_id=request_id, trajectory=codec.trajectory_to_proto(play(chat))
    )
    first = asyncio.create_task(servicer.Score(request, None))
    await until(lambda: scorer.num_calls == 1)
    first.cancel()
    await asyncio.wait([first])
    next_one = asyncio.create_task(teacher.score([play(chat)]))
    await asyncio.sleep(0.01)
    assert scorer.num_calls == 1
    scorer.go.set()
    await next_one
    assert scorer.num_calls == 2


async def test_a_trajectory_that_does_not_fit_is_an_invalid_argument(stub, chat):
    trajectory = play(chat, num_turns=1)
    turn = dataclasses.replace(trajectory.turns[0], prompt_token_ids=np.array([1, 2, 3]))
    with pytest.raises(ContractError, match="messages render to"):
        await score(stub, dataclasses.replace(trajectory, turns=(turn,)))


async def test_skills_are_handed_out_ready_for_a_prompt(stub, chat):
    request = teacher_pb2.RetrieveSkillsRequest(task=codec.task_to_proto(CLEAN), key="g0")
    response = await call(stub.RetrieveSkills, request, timeout_s=10)
    assert list(response.skill_ids) == ["general", "clean"]
    assert response.num_specific_skills == 1
    assert (
        response.text == "look before you act .\n\nskill clean : first use sink . after sink put ."
    )
    found = (response.skill_library_hash, response.template_hash)
    assert found == (LIBRARY.content_hash, chat.template_hash)
    assert response.retrieval == "task_type"


@pytest.mark.parametrize("kind", ["embedding", "ucb"])
async def test_skills_by_meaning_or_utility_are_handed_out_the_same_for_the_same_key(
    chat, bus, scorer, kind, tmp_path
):
    index = (
        SkillIndex(LIBRARY.specific, SentenceEncoder(), tmp_path) if kind == "embedding" else None
    )
    utility = SkillUtility(bus, 0.5) if kind == "ucb" else None
    retriever = Retriever(LIBRARY, kind=kind, num_skills=1, index=index, utility=utility)
    contexts = ContextBuilder(chat, retriever, 1000)
    teacher = Teacher(contexts, scorer, build_follower(bus, scorer, 2), TeacherMetrics(), max_lag=2)
    request = teacher_pb2.RetrieveSkillsRequest(task=codec.task_to_proto(CLEAN), key="g0")
    answers = [await TeacherServicer(teacher).RetrieveSkills(request, None) for _ in range(2)]
    assert answers[0] == answers[1]
    assert (list(answers[0].skill_ids), answers[0].retrieval) == (["general", "clean"], kind)
    (scored,) = await teacher.score([play(chat, group_id="g0")])
    assert (scored.score.skill_ids, scored.score.retrieval) == (("general", "clean"), kind)


async def test_no_skills_are_no_text(chat, bus, scorer):
    contexts = ContextBuilder(chat, Retriever(LIBRARY, kind="none", num_skills=3), 1000)
    servicer = TeacherServicer(
        Teacher(contexts, scorer, build_follower(bus, scorer, 2), TeacherMetrics(), max_lag=2)
    )
    response = await servicer.RetrieveSkills(
        teacher_pb2.RetrieveSkillsRequest(task=codec.task_to_proto(CLEAN)), None
    )
    assert (response.text, list(response.skill_ids)) == ("", [])
