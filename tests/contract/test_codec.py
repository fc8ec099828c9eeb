"""The codec reads back bit for bit what it wrote, reads older bytes, and names what is bad.

The golden trajectory, tokens in brackets, delta-coded:

    turn 0   prompt [1 2 3]              response [10 11]      versions 4 4
    turn 1   prompt [1 2 3 10 11 | 20]   response [12 13 14]   versions 4 5 5
    turn 2   prompt [1 2 | 30]           response []

Turn 1 extends the previous turn; turn 2 is a fresh prompt that shares two tokens with it.
"""

import contextlib
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sdar.contracts import codec
from sdar.contracts.errors import ContractError, CorruptionError
from sdar.contracts.streams import Stream
from sdar.contracts.types import (
    ChatMessage,
    EnvironmentIdentity,
    EpisodeEnd,
    GroupOutcome,
    LedgerEvent,
    MetricRecord,
    ModelIdentity,
    Purpose,
    SamplingParameters,
    ScoredTrajectory,
    SkillChoice,
    SkillOutcome,
    StopReason,
    Task,
    TaskGroup,
    TeacherScore,
    TensorEntry,
    Trajectory,
    Turn,
    WeightsManifest,
)
from sdar.v1 import policy_pb2, task_pb2, trajectory_pb2

GOLDEN = Path(__file__).parent / "golden"

TASK = Task("household", "train", "household-7", "clean", "put a clean plate in the shelf", 7)
MODEL = ModelIdentity("tiny", "f00d")


def make_turn(
    index: int, prompt: list[int], response: list[int], versions: list[int], **changes: object
) -> Turn:
    values: dict[str, object] = {
        "turn_index": index,
        "prompt_token_ids": prompt,
        "messages": (ChatMessage("user", f"You see ☃ {index}."),),
        "extends_previous": False,
        "response_token_ids": response,
        "behavior_logprobs": [-0.25 * (i + 1) for i in range(len(response))],
        "policy_versions": versions,
        "response_text": f"<action>use {index}</action>",
        "stop_reason": StopReason.END_OF_TURN,
        "action": f"use {index}",
        "is_action_valid": True,
        "reward": 0.5 * index,
        "reward_components": {"step": 0.5 * index, "penalty": 0.0},
    }
    return Turn(**(values | changes))  # type: ignore[arg-type]


def make_trajectory(**changes: object) -> Trajectory:
    turns = (
        make_turn(0, [1, 2, 3], [10, 11], [4, 4]),
        make_turn(
            1,
            [1, 2, 3, 10, 11, 20],
            [12, 13, 14],
            [4, 5, 5],
            extends_previous=True,
            stop_reason=StopReason.LENGTH,
        ),
        make_turn(
            2,
            [1, 2, 30],
            [],
            [],
            reward_components={},
            is_action_valid=False,
            action="",
            response_text="",
        ),
    )
    values: dict[str, object] = {
        "run_id": "run",
        "group_id": "g1",
        "trajectory_id": "g1.3.a0",
        "attempt": 0,
        "episode_index": 3,
        "group_size": 8,
        "task": TASK,
        "purpose": Purpose.TRAIN,
        "environment": EnvironmentIdentity("household", "1"),
        "model": MODEL,
        "sampling": SamplingParameters(1.0, 1.0, 16),
        "turns": turns,
        "end": EpisodeEnd.TRUNCATED,
        "is_success": True,
        "duration_s": 1.5,
    }
    return Trajectory(**(values | changes))  # type: ignore[arg-type]


def make_score(**changes: object) -> TeacherScore:
    values: dict[str, object] = {
        "trajectory_id": "g1.3.a0",
        "teacher_version": 5,
        "turn_logprobs": ([-0.5, -1.5], [-2.0, -0.125, -3.0], []),
        "skill_ids": ("general-1", "clean"),
        "num_specific_skills": 1,
        "skill_library_hash": "aa",
        "template_hash": "bb",
        "retrieval": "task_type",
        "scorer": "transformers",
    }
    return TeacherScore(**(values | changes))  # type: ignore[arg-type]


GOLDEN_VALUES = {
    "task_group": TaskGroup(
        "run",
        "g1",
        TASK,
        8,
        Purpose.EVALUATION,
        12,
        SamplingParameters(0.4, 1.0, 16),
        6,
        "127.0.0.1:9093",
        "e3",
    ),
    "trajectory": make_trajectory(),
    "scored_trajectory": ScoredTrajectory(make_trajectory(), make_score()),
    "weights_manifest": WeightsManifest(
        "run",
        12,
        "v12",
        (TensorEntry("w", "F32", (2, 3), "model.safetensors", "ab"),),
        24,
        MODEL,
        1700000000.25,
    ),
    "ledger_event": LedgerEvent(
        "run", "g1", GroupOutcome.STALE, 8, 12, "5 versions behind, bound 4"
    ),
    "metric_record": MetricRecord(
        "run", "learner", "learner-0", 12, 1700000000.25, {"loss": -0.0, "gate_mean": 0.5}
    ),
    "skill_event": SkillOutcome("g1.3.a0", "clean", ("clean", "heat"), True),
}
ENCODE = {name: getattr(codec, f"encode_{name}") for name in GOLDEN_VALUES}
DECODE = {name: getattr(codec, f"decode_{name}") for name in GOLDEN_VALUES}


@pytest.mark.parametrize("name", GOLDEN_VALUES)
def test_golden_bytes_are_what_is_written_and_can_be_read(name):
    """A difference here is a change of the wire.

    If it is meant and readers can take it: SDAR_WRITE_GOLDEN=1 pytest.
    """
    path = GOLDEN / f"{name}.bin"
    if os.environ.get("SDAR_WRITE_GOLDEN"):
        path.write_bytes(ENCODE[name](GOLDEN_VALUES[name]))
    assert ENCODE[name](GOLDEN_VALUES[name]) == path.read_bytes()
    assert DECODE[name](path.read_bytes()) == GOLDEN_VALUES[name]


# ---- round trips

# Lone surrogates cannot be written; a test of their own says so.
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
text_lists = st.lists(texts, max_size=3).map(tuple)
int32s, uint32s = st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**32 - 1)
numbers = st.floats(allow_nan=False)
finite = st.floats(allow_nan=False, allow_infinity=False)
tasks = st.builds(Task, texts, texts, texts, texts, texts, st.integers(-(2**63), 2**63 - 1))
samplings = st.builds(SamplingParameters, numbers, numbers, uint32s)
models = st.builds(ModelIdentity, texts, texts)
finite_float32s = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@st.composite
def turn_lists(draw: st.DrawFn) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for index in range(draw(st.integers(1, 4))):
        extends = bool(turns) and draw(st.booleans())
        history = [*turns[-1].prompt_token_ids, *turns[-1].response_token_ids] if turns else []
        kept = len(history) if extends else draw(st.integers(0, len(history)))
        prompt = history[:kept] + draw(st.lists(st.integers(0, 2**31 - 1), max_size=6))
        length = draw(st.integers(0, 6))
        turns.append(
            Turn(
                turn_index=index,
                prompt_token_ids=prompt,
                messages=tuple(draw(st.lists(st.builds(ChatMessage, texts, texts), max_size=2))),
                extends_previous=extends,
                response_token_ids=draw(
                    npst.arrays(np.int32, length, elements=st.integers(0, 2**31 - 1))
                ),
                behavior_logprobs=draw(npst.arrays(np.float32, length, elements=finite_float32s)),
                policy_versions=draw(
                    npst.arrays(np.int32, length, elements=st.integers(0, 3) | int32s)
                ),
                response_text=draw(texts),
                stop_reason=draw(st.sampled_from(StopReason)),
                action=draw(texts),
                is_action_valid=draw(st.booleans()),
                reward=draw(finite),
                reward_components=draw(st.dictionaries(texts, numbers, max_size=3)),
            )
        )
    return tuple(turns)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    group_size = draw(st.integers(1, 2**32 - 1))
    return Trajectory(
        run_id=draw(texts),
        group_id=draw(texts),
        trajectory_id=draw(texts),
        attempt=draw(uint32s),
        episode_index=draw(st.integers(0, group_size - 1)),
        group_size=group_size,
        task=draw(tasks),
        purpose=draw(st.sampled_from(Purpose)),
        environment=EnvironmentIdentity(draw(texts), draw(texts)),
        model=draw(models),
        sampling=draw(samplings),
        turns=draw(turn_lists()),
        end=draw(st.sampled_from(EpisodeEnd)),
        is_success=draw(st.booleans()),
        evaluation_id=draw(texts),
        duration_s=draw(numbers),
    )


@st.composite
def scored_trajectories(draw: st.DrawFn) -> ScoredTrajectory:
    trajectory = draw(trajectories())
    if draw(st.booleans()):
        return ScoredTrajectory(trajectory, None)
    logprobs = tuple(
        draw(
            npst.arrays(
                np.float32,
                len(turn.response_token_ids),
                elements=finite_float32s | st.just(-np.inf),
            )
        )
        for turn in trajectory.turns
    )
    score = make_score(
        trajectory_id=trajectory.trajectory_id,
        turn_logprobs=logprobs,
        skill_ids=tuple(draw(st.lists(texts, max_size=3))),
        teacher_version=draw(int32s),
        num_specific_skills=draw(uint32s),
    )
    return ScoredTrajectory(trajectory, score)


positive = st.integers(1, 2**32 - 1)
VALUES = {
    "task_group": st.builds(
        TaskGroup,
        texts,
        texts,
        tasks,
        positive,
        st.sampled_from(Purpose),
        int32s,
        samplings,
        positive,
        texts,
        texts,
    ),
    "trajectory": trajectories(),
    "scored_trajectory": scored_trajectories(),
    "weights_manifest": st.builds(
        WeightsManifest,
        texts,
        st.integers(0, 2**31 - 1),
        texts,
        st.lists(
            st.builds(
                TensorEntry,
                texts,
                texts,
                st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple),
                texts,
                texts,
            ),
            max_size=3,
        ).map(tuple),
        st.integers(0, 2**64 - 1),
        models,
        numbers,
    ),
    "ledger_event": st.builds(
        LedgerEvent,
        texts,
        texts,
        st.sampled_from(GroupOutcome),
        uint32s,
        int32s,
        texts,
        stage=texts,
    ),
    "metric_record": st.builds(
        MetricRecord,
        texts,
        texts.filter(bool),
        texts,
        int32s,
        numbers,
        st.dictionaries(texts, numbers, max_size=4),
    ),
    "skill_event": st.one_of(
        st.builds(SkillChoice, texts, texts, text_lists),
        st.builds(SkillOutcome, texts, texts, text_lists, st.booleans()),
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_written_is_read_back(name):
    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
    @given(VALUES[name])
    def check(value: object) -> None:
        data = ENCODE[name](value)
        assert DECODE[name](data) == value
        assert ENCODE[name](DECODE[name](data)) == data

    check()


def test_float32_values_keep_their_bits():
    bits = np.array(
        [0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0xFF7FFFFF, 0xBDCCCCCD], np.uint32
    )
    logprobs = bits.view(np.float32)  # -0.0, denormals, smallest normal, -max, -0.1
    turn = make_turn(0, [1], list(range(6)), [0] * 6, behavior_logprobs=logprobs)
    read = codec.decode_trajectory(codec.encode_trajectory(make_trajectory(turns=(turn,)))).turns[0]
    assert read.behavior_logprobs.view(np.uint32).tolist() == bits.tolist()

    payload_nan = np.array([0x7FC12345, 0xFF800000], np.uint32).view(np.float32)
    score = codec.teacher_score_from_proto(
        codec.teacher_score_to_proto(make_score(turn_logprobs=(payload_nan,)))
    )
    assert score.turn_logprobs[0].view(np.uint32).tolist() == [0x7FC12345, 0xFF800000]


def test_a_megabyte_of_text_travels():
    text = "наблюдение ☃ " * 80_000
    trajectory = make_trajectory(
        turns=(make_turn(0, [1], [2], [0], messages=(ChatMessage("user", text),)),)
    )
    assert codec.decode_trajectory(codec.encode_trajectory(trajectory)) == trajectory


def test_a_growing_conversation_costs_linear_bytes():
    """50 turns of 20 new tokens, each written once, though the last prompt repeats them all."""
    turns: list[Turn] = []
    history: list[int] = []
    for index in range(50):
        prompt = history + list(range(100, 110))
        turns.append(
            make_turn(
                index, prompt, list(range(10)), [3] * 10, extends_previous=index > 0, messages=()
            )
        )
        history = prompt + list(range(10))
    trajectory = make_trajectory(turns=tuple(turns))
    data = codec.encode_trajectory(trajectory)
    assert codec.decode_trajectory(data) == trajectory
    assert len(data) < 50 * (30 * 4 + 120)


def test_decoded_arrays_cannot_be_written_to():
    turn = codec.decode_trajectory(codec.encode_trajectory(make_trajectory())).turns[1]
    for array in (
        turn.prompt_token_ids,
        turn.response_token_ids,
        turn.behavior_logprobs,
        turn.policy_versions,
    ):
        assert not array.flags.writeable


def test_message_prompts_survive_for_servers_and_stop_reasons_go_out_by_their_own_names():
    messages = (ChatMessage("system", "a"), ChatMessage("user", "b"))
    assert codec.chat_messages_from_proto(codec.chat_messages_to_proto(messages)) == messages
    for reason in StopReason:
        name = trajectory_pb2.StopReason.Name(codec.stop_reason_to_proto(reason))
        assert name == f"STOP_REASON_{reason.name}"


# ---- what must be refused


@pytest.mark.parametrize("name", GOLDEN_VALUES)
def test_garbage_names_its_type_and_stream(name):
    with pytest.raises(CorruptionError, match=r"Stream .*: 4 bytes are no [A-Z]") as caught:
        DECODE[name](b"\xff\xff\xff\xff")
    assert caught.value.fields["stream"] in set(Stream)


@pytest.mark.parametrize("name", GOLDEN_VALUES)
def test_nothing_at_all_is_not_a_record(name):
    with pytest.raises(ContractError):
        DECODE[name](b"")


@pytest.mark.parametrize("name", GOLDEN_VALUES)
def test_a_cut_entry_never_escapes_as_anything_but_our_errors(name):
    data = ENCODE[name](GOLDEN_VALUES[name])
    with pytest.raises(CorruptionError):
        DECODE[name](data[:-1])
    for size in range(len(data)):
        # A message cut between two fields may be whole; any other error would fail here.
        with contextlib.suppress(CorruptionError, ContractError):
            DECODE[name](data[:size])


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_no_bytes_break_the_decoder(data):
    for decode in DECODE.values():
        with contextlib.suppress(CorruptionError, ContractError):
            decode(data)


def test_the_evaluation_stream_is_named_when_it_is_the_one():
    with pytest.raises(CorruptionError, match="Stream evaluations"):
        codec.decode_trajectory(b"\xff", Stream.EVALUATIONS)


@pytest.mark.parametrize("name", GOLDEN_VALUES)
def test_fields_of_a_newer_writer_are_ignored(name):
    # Field 1023, three bytes.
    newer = ENCODE[name](GOLDEN_VALUES[name]) + bytes([0xFA, 0x3F, 3]) + b"new"
    assert DECODE[name](newer) == GOLDEN_VALUES[name]


def changed(**changes: object) -> trajectory_pb2.Trajectory:
    """The golden trajectory's message with fields of turn 1 changed."""
    message = codec.trajectory_to_proto(make_trajectory())
    for field, value in changes.items():
        setattr(message.turns[1], field, value)
    return message


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"num_prefix_tokens": 6}, ContractError, "num_prefix_tokens 6 with 5 tokens"),
        (
            {"num_prefix_tokens": 3},
            ContractError,
            "extends the previous one, but shares 3 of its 5",
        ),
        ({"packed_prompt_suffix": b"12345"}, CorruptionError, "packed_prompt_suffix holds"),
        (
            {"packed_response_token_ids": b"12345"},
            CorruptionError,
            "packed_response_token_ids holds 5 bytes",
        ),
        (
            {"packed_behavior_logprobs": b"1234"},
            ContractError,
            "1 behavior_logprobs for 3 sampled tokens",
        ),
        (
            {"packed_behavior_logprobs": np.full(3, np.nan, "<f4").tobytes()},
            ContractError,
            "not finite",
        ),
        ({"packed_response_token_ids": b"\xff" * 12}, ContractError, "token id of 2\\^31 or more"),
        (
            {"stop_reason": 0},
            ContractError,
            "stop_reason is 0, which is none of end_of_turn, length",
        ),
        ({"stop_reason": 99}, ContractError, "stop_reason is 99"),
        ({"reward": float("nan")}, ContractError, "reward nan is not finite"),
    ],
)
def test_a_turn_that_contradicts_itself_is_refused_with_its_place(changes, error, text):
    with pytest.raises(error, match=text) as caught:
        codec.decode_trajectory(changed(**changes).SerializeToString())
    assert caught.value.message.startswith(
        "Stream trajectories, Trajectory: Trajectory 'g1.3.a0': "
    )
    assert caught.value.fields["trajectory_id"] == "g1.3.a0"


@pytest.mark.parametrize(
    "spans", [[(4, 2)], [(4, 2_000_000_000), (5, 2_000_000_000)], [(4, 0), (4, 3)], []]
)
def test_version_spans_must_cover_the_response(spans):
    message = changed()
    del message.turns[1].policy_version_spans[:]
    for version, length in spans:
        message.turns[1].policy_version_spans.add(policy_version=version, num_tokens=length)
    with pytest.raises(ContractError, match="policy version spans"):
        codec.trajectory_from_proto(message)


def test_prompts_that_would_expand_without_bound_are_refused(monkeypatch):
    monkeypatch.setattr(codec, "MAX_PROMPT_TOKENS", 10)
    with pytest.raises(ContractError, match="more than 10 tokens"):
        codec.decode_trajectory(codec.encode_trajectory(make_trajectory()))


@pytest.mark.parametrize("field", ["task", "environment", "model", "sampling"])
def test_a_trajectory_without_its_provenance_is_refused(field):
    message = codec.trajectory_to_proto(make_trajectory())
    message.ClearField(field)
    with pytest.raises(ContractError, match=f"has no {field}"):
        codec.trajectory_from_proto(message)


def test_a_false_claim_of_extension_is_refused_when_written():
    turns = (
        make_turn(0, [1, 2], [3], [0]),
        make_turn(1, [1, 2, 4], [5], [0], extends_previous=True),
    )
    with pytest.raises(ContractError, match="shares 2 of its 3 tokens") as caught:
        codec.encode_trajectory(make_trajectory(turns=turns))
    assert caught.value.fields["trajectory_id"] == "g1.3.a0"
    with pytest.raises(ContractError, match="Turn 0 says that it extends"):
        codec.encode_trajectory(
            make_trajectory(turns=(make_turn(0, [1], [3], [0], extends_previous=True),))
        )


def test_a_score_of_another_trajectory_is_refused():
    message = codec.scored_trajectory_to_proto(ScoredTrajectory(make_trajectory(), make_score()))
    message.score.trajectory_id = "g2.0.a0"
    with pytest.raises(ContractError, match=r"Stream scored, ScoredTrajectory: Score of g2\.0\.a0"):
        codec.decode_scored_trajectory(message.SerializeToString())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"description": "half a \ud800 pair"}, "Task cannot be written"),
        ({"seed": 2**63}, "Task cannot be written"),
    ],
)
def test_what_the_wire_cannot_hold_is_refused_when_written(change, text):
    with pytest.raises(ContractError, match=text):
        codec.encode_trajectory(make_trajectory(task=dataclasses.replace(TASK, **change)))


def test_text_of_the_policy_that_is_not_unicode_is_refused_when_written():
    with pytest.raises(ContractError, match="cannot be written"):
        codec.encode_trajectory(
            make_trajectory(turns=(make_turn(0, [1], [2], [0], response_text="\udc80"),))
        )


def test_wire_and_domain_fields_have_the_same_names():
    """Whoever adds a field to a type without giving it a place on the wire finds out here."""
    renamed = {
        "turn_index": None,
        "prompt_token_ids": "packed_prompt_suffix",
        "response_token_ids": "packed_response_token_ids",
        "behavior_logprobs": "packed_behavior_logprobs",
        "policy_versions": "policy_version_spans",
        "turn_logprobs": "packed_turn_logprobs",
    }
    pairs = [
        (kind, getattr(trajectory_pb2, kind.__name__))
        for kind in (Turn, Trajectory, TeacherScore, ScoredTrajectory)
    ]
    pairs += [
        (kind, getattr(task_pb2, kind.__name__))
        for kind in (Task, TaskGroup, SamplingParameters, LedgerEvent)
    ]
    pairs += [(kind, getattr(policy_pb2, kind.__name__)) for kind in (WeightsManifest, TensorEntry)]
    for kind, message in pairs:
        names = {renamed.get(field.name, field.name) for field in dataclasses.fields(kind)} - {None}
        assert names == set(message.DESCRIPTOR.fields_by_name) - {"num_prefix_tokens"}, (
            kind.__name__
        )
