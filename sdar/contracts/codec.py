"""Translates between domain types and sdar.v1 protobuf; no other module knows both sides.

Three forms per type: `X_to_proto` / `X_from_proto` for servers and clients, and for what travels on
a stream `encode_X` / `decode_X` (bytes). Encoding is deterministic: equal values give equal bytes.

Bytes that are not a message raise CorruptionError; a message that contradicts itself raises
ContractError; both name the type and the stream. Fields this build does not know are ignored, so an
older reader survives a newer writer. A value that the wire cannot hold (a lone surrogate, an
integer out of range) raises ContractError when it is written.

Arrays are mapped, not copied: decoded token ids and log-probs are read-only views of the message's
own bytes, bit for bit. It never does I/O.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, EncodeError

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
    PolicyVersions,
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
from sdar.v1 import gateway_pb2, policy_pb2, task_pb2, teacher_pb2, trajectory_pb2

T = TypeVar("T")
M = TypeVar("M")
E = TypeVar("E", bound=StrEnum)

# Token ids stay below 2^31, so the domain's int32 and the wire's uint32 have the same bytes.
_WIRE_INT32 = np.dtype("<i4")
_WIRE_FLOAT32 = np.dtype("<f4")

# Delta-coded prompts expand on decoding; without a bound a megabyte of hostile turns would expand
# to terabytes.
MAX_PROMPT_TOKENS = 1 << 26


# ---- enumerations


def _wire_enum(members: type[E], wire: Any, prefix: str) -> tuple[dict[E, Any], dict[int, E]]:
    # On the wire a value's name begins with its enumeration's: PURPOSE_TRAIN for Purpose.TRAIN.
    to_wire = {member: int(wire.Value(f"{prefix}_{member.name}")) for member in members}
    return to_wire, {value: member for member, value in to_wire.items()}


_PURPOSE, _PURPOSE_BACK = _wire_enum(Purpose, task_pb2.Purpose, "PURPOSE")
_OUTCOME, _OUTCOME_BACK = _wire_enum(GroupOutcome, task_pb2.GroupOutcome, "GROUP_OUTCOME")
_STOP_REASON, _STOP_REASON_BACK = _wire_enum(StopReason, trajectory_pb2.StopReason, "STOP_REASON")
_EPISODE_END, _EPISODE_END_BACK = _wire_enum(EpisodeEnd, trajectory_pb2.EpisodeEnd, "EPISODE_END")


def _enum_from_wire(back: dict[int, E], value: int, where: str, field: str) -> E:
    try:
        return back[value]
    except KeyError:
        raise ContractError(
            f"{where}: {field} is {value}, which is none of {', '.join(back.values())}. "
            "Set it, or update this reader to the writer's version."
        ) from None


def stop_reason_to_proto(stop_reason: StopReason) -> trajectory_pb2.StopReason:
    reason: trajectory_pb2.StopReason = _STOP_REASON[stop_reason]
    return reason


# ---- small helpers


def _checked(to_proto: Callable[[T], M]) -> Callable[[T], M]:
    """Turn protobuf's own complaints about a value into a ContractError that names the type."""

    @functools.wraps(to_proto)
    def checked(value: T) -> M:
        try:
            return to_proto(value)
        except (ValueError, TypeError, OverflowError) as error:
            raise ContractError(
                f"{type(value).__name__} cannot be written: {error}. Pass valid Unicode text and "
                "numbers in the range that proto/sdar/v1 gives."
            ) from error

    return checked


@contextlib.contextmanager
def _name_place(where: str, **fields: object) -> Iterator[None]:
    """Raise what the block raises with the place in front of its message."""
    try:
        yield
    except (ContractError, CorruptionError) as error:
        raise type(error)(f"{where}: {error.message}", **{**error.fields, **fields}) from error


def _require(message: Any, kind: str, *fields: str) -> None:
    """Refuse a message that lacks a submessage; its defaults would pass for values."""
    for field in fields:
        if not message.HasField(field):
            raise ContractError(f"{kind} has no {field}. The writer must set it.")


def _pack(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> bytes:
    return array.astype(dtype, copy=False).tobytes()


def _unpack(data: bytes, dtype: np.dtype[Any], where: str, field: str) -> Any:
    """Map packed bytes as an array, without a copy."""
    # Token ids and log-probs alike take four bytes each.
    if len(data) % 4:
        raise CorruptionError(
            f"{where}: {field} holds {len(data)} bytes, not a multiple of 4. The entry was cut or "
            "packed wrongly."
        )
    return np.frombuffer(data, dtype)


# ---- tasks


@_checked
def task_to_proto(task: Task) -> task_pb2.Task:
    return task_pb2.Task(
        environment=task.environment,
        split=task.split,
        task_id=task.task_id,
        task_type=task.task_type,
        description=task.description,
        seed=task.seed,
    )


def task_from_proto(message: task_pb2.Task) -> Task:
    return Task(
        message.environment,
        message.split,
        message.task_id,
        message.task_type,
        message.description,
        message.seed,
    )


@_checked
def sampling_to_proto(sampling: SamplingParameters) -> task_pb2.SamplingParameters:
    return task_pb2.SamplingParameters(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_response_tokens=sampling.max_response_tokens,
    )


def sampling_from_proto(message: task_pb2.SamplingParameters) -> SamplingParameters:
    return SamplingParameters(message.temperature, message.top_p, message.max_response_tokens)


@_checked
def task_group_to_proto(group: TaskGroup) -> task_pb2.TaskGroup:
    return task_pb2.TaskGroup(
        run_id=group.run_id,
        group_id=group.group_id,
        task=task_to_proto(group.task),
        group_size=group.group_size,
        purpose=_PURPOSE[group.purpose],
        admitted_version=group.admitted_version,
        sampling=sampling_to_proto(group.sampling),
        max_turns=group.max_turns,
        environment_address=group.environment_address,
        evaluation_id=group.evaluation_id,
    )


def task_group_from_proto(message: task_pb2.TaskGroup) -> TaskGroup:
    kind = f"TaskGroup {message.group_id!r}"
    _require(message, kind, "task", "sampling")
    return TaskGroup(
        run_id=message.run_id,
        group_id=message.group_id,
        task=task_from_proto(message.task),
        group_size=message.group_size,
        purpose=_enum_from_wire(_PURPOSE_BACK, message.purpose, kind, "purpose"),
        admitted_version=message.admitted_version,
        sampling=sampling_from_proto(message.sampling),
        max_turns=message.max_turns,
        environment_address=message.environment_address,
        evaluation_id=message.evaluation_id,
    )


@_checked
def ledger_event_to_proto(event: LedgerEvent) -> task_pb2.LedgerEvent:
    return task_pb2.LedgerEvent(
        run_id=event.run_id,
        group_id=event.group_id,
        outcome=_OUTCOME[event.outcome],
        num_trajectories=event.num_trajectories,
        policy_version=event.policy_version,
        reason=event.reason,
        episode_turns=event.episode_turns,
        stage=event.stage,
    )


def ledger_event_from_proto(message: task_pb2.LedgerEvent) -> LedgerEvent:
    return LedgerEvent(
        run_id=message.run_id,
        group_id=message.group_id,
        outcome=_enum_from_wire(
            _OUTCOME_BACK, message.outcome, f"LedgerEvent of group {message.group_id!r}", "outcome"
        ),
        num_trajectories=message.num_trajectories,
        policy_version=message.policy_version,
        reason=message.reason,
        episode_turns=tuple(message.episode_turns),
        stage=message.stage,
    )


# ---- turns


def chat_messages_to_proto(messages: Iterable[ChatMessage]) -> list[trajectory_pb2.ChatMessage]:
    return [
        trajectory_pb2.ChatMessage(role=message.role, content=message.content)
        for message in messages
    ]


def chat_messages_from_proto(
    messages: Iterable[trajectory_pb2.ChatMessage],
) -> tuple[ChatMessage, ...]:
    return tuple([ChatMessage(message.role, message.content) for message in messages])


def _count_shared_prefix(history: bytes, prompt: bytes) -> int:
    """Number of leading tokens that two packed sequences have in common."""
    # The usual case: the prompt goes on where the previous turn ended.
    if prompt.startswith(history):
        return len(history) // 4
    # As numbers, not bytes: the first byte that differs may lie within a token.
    size = min(len(history), len(prompt))
    differs = np.frombuffer(history[:size], _WIRE_INT32) != np.frombuffer(
        prompt[:size], _WIRE_INT32
    )
    return int(differs.argmax()) if differs.any() else size // 4


def _check_extension(
    turn_index: int, extends_previous: bool, num_shared: int, num_history: int
) -> None:
    if extends_previous and (turn_index == 0 or num_shared != num_history):
        raise ContractError(
            f"Turn {turn_index} says that it extends the previous one, but shares {num_shared} of "
            f"its {num_history} tokens. Set extends_previous only if the prompt begins with the "
            "previous prompt and response, token by token.",
            turn_index=turn_index,
        )


def _versions_to_spans(versions: PolicyVersions) -> list[trajectory_pb2.PolicyVersionSpan]:
    """Run-length code; nearly always one span, for weights change seldom within a turn."""
    if not len(versions):
        return []
    packed = versions.tobytes()
    # One version: its four bytes again and again.
    if packed == packed[:4] * len(versions):
        return [
            trajectory_pb2.PolicyVersionSpan(
                policy_version=versions.item(0), num_tokens=len(versions)
            )
        ]
    # A span begins at 0 and wherever a version differs from the one before it.
    bounds = [0, *(np.flatnonzero(versions[1:] != versions[:-1]) + 1).tolist(), len(versions)]
    return [
        trajectory_pb2.PolicyVersionSpan(
            policy_version=versions.item(start), num_tokens=end - start
        )
        for start, end in itertools.pairwise(bounds)
    ]


def _versions_from_spans(spans: Any, num_tokens: int, turn_index: int) -> PolicyVersions:
    versions = [span.policy_version for span in spans]
    lengths = [span.num_tokens for span in spans]
    # Counted before anything is allocated: a span's length is the sender's claim.
    if sum(lengths) != num_tokens or 0 in lengths:
        raise ContractError(
            f"Turn {turn_index}: policy version spans of {lengths} tokens for {num_tokens} sampled "
            "tokens. Spans hold at least one token each and sum to the response.",
            turn_index=turn_index,
        )
    # Bytes make a read-only array at once, which is what a Turn keeps.
    if len(versions) == 1:
        return np.frombuffer(
            versions[0].to_bytes(4, sys.byteorder, signed=True) * num_tokens, np.int32
        )
    return np.repeat(np.array(versions, np.int32), lengths)


def _turn_to_proto(
    turn: Turn, prompt: bytes, response: bytes, history: bytes
) -> trajectory_pb2.Turn:
    """`prompt` and `response` are this turn's, packed; `history` is the previous turn's, joined."""
    num_shared = _count_shared_prefix(history, prompt)
    _check_extension(turn.turn_index, turn.extends_previous, num_shared, len(history) // 4)
    return trajectory_pb2.Turn(
        num_prefix_tokens=num_shared,
        packed_prompt_suffix=prompt[4 * num_shared :],
        messages=chat_messages_to_proto(turn.messages),
        extends_previous=turn.extends_previous,
        packed_response_token_ids=response,
        packed_behavior_logprobs=_pack(turn.behavior_logprobs, _WIRE_FLOAT32),
        policy_version_spans=_versions_to_spans(turn.policy_versions),
        response_text=turn.response_text,
        stop_reason=_STOP_REASON[turn.stop_reason],
        action=turn.action,
        is_action_valid=turn.is_action_valid,
        reward=turn.reward,
        # None leaves the map unset, which is cheaper than an empty one and the same bytes.
        reward_components=turn.reward_components or None,
    )


def _turns_to_proto(turns: Iterable[Turn]) -> list[trajectory_pb2.Turn]:
    messages: list[trajectory_pb2.Turn] = []
    history = b""
    for turn in turns:
        prompt = _pack(turn.prompt_token_ids, _WIRE_INT32)
        response = _pack(turn.response_token_ids, _WIRE_INT32)
        messages.append(_turn_to_proto(turn, prompt, response, history))
        history = prompt + response
    return messages


def _prompt_from_proto(message: trajectory_pb2.Turn, history: bytes, turn_index: int) -> bytes:
    """Undo the delta code; packed."""
    num_shared = message.num_prefix_tokens
    num_history = len(history) // 4
    if num_shared > num_history:
        raise ContractError(
            f"Turn {turn_index}: num_prefix_tokens {num_shared} with {num_history} tokens before "
            "it. A prompt can share no more than the previous turn's prompt and response.",
            turn_index=turn_index,
        )
    _check_extension(turn_index, message.extends_previous, num_shared, num_history)
    prompt: bytes = history[: 4 * num_shared] + message.packed_prompt_suffix
    return prompt


def _turn_from_proto(
    message: trajectory_pb2.Turn, prompt: bytes, response: bytes, turn_index: int
) -> Turn:
    where = f"Turn {turn_index}"
    return Turn(
        turn_index,
        _unpack(prompt, _WIRE_INT32, where, "packed_prompt_suffix"),
        chat_messages_from_proto(message.messages),
        message.extends_previous,
        _unpack(response, _WIRE_INT32, where, "packed_response_token_ids"),
        _unpack(message.packed_behavior_logprobs, _WIRE_FLOAT32, where, "packed_behavior_logprobs"),
        _versions_from_spans(message.policy_version_spans, len(response) // 4, turn_index),
        message.response_text,
        _enum_from_wire(_STOP_REASON_BACK, message.stop_reason, where, "stop_reason"),
        message.action,
        message.is_action_valid,
        message.reward,
        dict(message.reward_components),
    )


def _turns_from_proto(messages: Iterable[trajectory_pb2.Turn]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    new_tokens: list[bytes] = []
    history = b""
    num_prompt_bytes = 0
    for index, message in enumerate(messages):
        prompt = _prompt_from_proto(message, history, index)
        response = message.packed_response_token_ids
        num_prompt_bytes += len(prompt)
        if num_prompt_bytes > 4 * MAX_PROMPT_TOKENS:
            raise ContractError(
                f"Turn {index}: the prompts add up to more than {MAX_PROMPT_TOKENS} tokens. "
                "Limit the number of turns or the length of a prompt."
            )
        turns.append(_turn_from_proto(message, prompt, response, index))
        new_tokens += (message.packed_prompt_suffix, response)
        history = prompt + response
    # Once over what each turn added: the prompts repeat the earlier tokens.
    _check_token_ids(b"".join(new_tokens))
    return tuple(turns)


def _check_token_ids(packed: bytes) -> None:
    # The domain reads the wire's uint32 as int32, where an id of 2^31 or more is negative.
    if (np.frombuffer(packed, _WIRE_INT32) < 0).any():
        raise ContractError(
            "A turn holds a token id of 2^31 or more. Token ids index the model's vocabulary."
        )


# ---- trajectories


@_checked
def model_to_proto(model: ModelIdentity) -> trajectory_pb2.ModelIdentity:
    return trajectory_pb2.ModelIdentity(name=model.name, fingerprint=model.fingerprint)


def model_from_proto(message: trajectory_pb2.ModelIdentity) -> ModelIdentity:
    return ModelIdentity(message.name, message.fingerprint)


def _environment_to_proto(
    environment: EnvironmentIdentity,
) -> trajectory_pb2.EnvironmentIdentity:
    return trajectory_pb2.EnvironmentIdentity(name=environment.name, version=environment.version)


@_checked
def trajectory_to_proto(trajectory: Trajectory) -> trajectory_pb2.Trajectory:
    trajectory_id = trajectory.trajectory_id
    with _name_place(f"Trajectory {trajectory_id!r}", trajectory_id=trajectory_id):
        turns = _turns_to_proto(trajectory.turns)
    return trajectory_pb2.Trajectory(
        run_id=trajectory.run_id,
        group_id=trajectory.group_id,
        trajectory_id=trajectory_id,
        attempt=trajectory.attempt,
        episode_index=trajectory.episode_index,
        group_size=trajectory.group_size,
        task=task_to_proto(trajectory.task),
        purpose=_PURPOSE[trajectory.purpose],
        environment=_environment_to_proto(trajectory.environment),
        model=model_to_proto(trajectory.model),
        sampling=sampling_to_proto(trajectory.sampling),
        turns=turns,
        end=_EPISODE_END[trajectory.end],
        is_success=trajectory.is_success,
        evaluation_id=trajectory.evaluation_id,
        duration_s=trajectory.duration_s,
    )


def trajectory_from_proto(message: trajectory_pb2.Trajectory) -> Trajectory:
    kind = f"Trajectory {message.trajectory_id!r}"
    _require(message, kind, "task", "environment", "model", "sampling")
    with _name_place(kind, trajectory_id=message.trajectory_id):
        turns = _turns_from_proto(message.turns)
    return Trajectory(
        run_id=message.run_id,
        group_id=message.group_id,
        trajectory_id=message.trajectory_id,
        attempt=message.attempt,
        episode_index=message.episode_index,
        group_size=message.group_size,
        task=task_from_proto(message.task),
        purpose=_enum_from_wire(_PURPOSE_BACK, message.purpose, kind, "purpose"),
        environment=EnvironmentIdentity(message.environment.name, message.environment.version),
        model=model_from_proto(message.model),
        sampling=sampling_from_proto(message.sampling),
        turns=turns,
        end=_enum_from_wire(_EPISODE_END_BACK, message.end, kind, "end"),
        is_success=message.is_success,
        evaluation_id=message.evaluation_id,
        duration_s=message.duration_s,
    )


@_checked
def teacher_score_to_proto(score: TeacherScore) -> trajectory_pb2.TeacherScore:
    return trajectory_pb2.TeacherScore(
        trajectory_id=score.trajectory_id,
        teacher_version=score.teacher_version,
        packed_turn_logprobs=[_pack(logprobs, _WIRE_FLOAT32) for logprobs in score.turn_logprobs],
        skill_ids=score.skill_ids,
        num_specific_skills=score.num_specific_skills,
        skill_library_hash=score.skill_library_hash,
        template_hash=score.template_hash,
        retrieval=score.retrieval,
        scorer=score.scorer,
    )


def teacher_score_from_proto(message: trajectory_pb2.TeacherScore) -> TeacherScore:
    where = f"TeacherScore of {message.trajectory_id!r}"
    return TeacherScore(
        trajectory_id=message.trajectory_id,
        teacher_version=message.teacher_version,
        turn_logprobs=tuple(
            _unpack(packed, _WIRE_FLOAT32, where, "packed_turn_logprobs")
            for packed in message.packed_turn_logprobs
        ),
        skill_ids=tuple(message.skill_ids),
        num_specific_skills=message.num_specific_skills,
        skill_library_hash=message.skill_library_hash,
        template_hash=message.template_hash,
        retrieval=message.retrieval,
        scorer=message.scorer,
    )


def scored_trajectory_to_proto(scored: ScoredTrajectory) -> trajectory_pb2.ScoredTrajectory:
    return trajectory_pb2.ScoredTrajectory(
        trajectory=trajectory_to_proto(scored.trajectory),
        score=None if scored.score is None else teacher_score_to_proto(scored.score),
    )


def scored_trajectory_from_proto(message: trajectory_pb2.ScoredTrajectory) -> ScoredTrajectory:
    _require(message, "ScoredTrajectory", "trajectory")
    return ScoredTrajectory(
        trajectory=trajectory_from_proto(message.trajectory),
        score=teacher_score_from_proto(message.score) if message.HasField("score") else None,
    )


# ---- weights, metrics


def _tensor_to_proto(entry: TensorEntry) -> policy_pb2.TensorEntry:
    return policy_pb2.TensorEntry(
        name=entry.name,
        dtype=entry.dtype,
        shape=entry.shape,
        shard=entry.shard,
        sha256=entry.sha256,
        is_delta=entry.is_delta,
    )


def _tensor_from_proto(message: policy_pb2.TensorEntry) -> TensorEntry:
    return TensorEntry(
        name=message.name,
        dtype=message.dtype,
        shape=tuple(message.shape),
        shard=message.shard,
        sha256=message.sha256,
        is_delta=message.is_delta,
    )


@_checked
def weights_manifest_to_proto(manifest: WeightsManifest) -> policy_pb2.WeightsManifest:
    return policy_pb2.WeightsManifest(
        run_id=manifest.run_id,
        policy_version=manifest.policy_version,
        path=manifest.path,
        tensors=[_tensor_to_proto(entry) for entry in manifest.tensors],
        size_bytes=manifest.size_bytes,
        model=model_to_proto(manifest.model),
        created_at_s=manifest.created_at_s,
        num_updates=manifest.num_updates,
        base_version=manifest.base_version,
    )


def weights_manifest_from_proto(message: policy_pb2.WeightsManifest) -> WeightsManifest:
    _require(message, f"WeightsManifest of version {message.policy_version}", "model")
    return WeightsManifest(
        run_id=message.run_id,
        policy_version=message.policy_version,
        path=message.path,
        tensors=tuple(map(_tensor_from_proto, message.tensors)),
        size_bytes=message.size_bytes,
        model=model_from_proto(message.model),
        created_at_s=message.created_at_s,
        num_updates=message.num_updates,
        # Unset is not 0, which is a version like any other.
        base_version=message.base_version if message.HasField("base_version") else None,
    )


@_checked
def metric_record_to_proto(record: MetricRecord) -> gateway_pb2.MetricRecord:
    return gateway_pb2.MetricRecord(
        run_id=record.run_id,
        service=record.service,
        instance=record.instance,
        policy_version=record.policy_version,
        at_s=record.at_s,
        values=record.values,
    )


def metric_record_from_proto(message: gateway_pb2.MetricRecord) -> MetricRecord:
    if not message.service:
        raise ContractError("MetricRecord has no service. The writer must set it.")
    return MetricRecord(
        run_id=message.run_id,
        service=message.service,
        instance=message.instance,
        policy_version=message.policy_version,
        at_s=message.at_s,
        values=dict(message.values),
    )


@_checked
def skill_event_to_proto(event: SkillChoice | SkillOutcome) -> teacher_pb2.SkillEvent:
    if isinstance(event, SkillChoice):
        choice = teacher_pb2.SkillChoice(
            key=event.key, task_type=event.task_type, skill_ids=event.skill_ids
        )
        return teacher_pb2.SkillEvent(choice=choice)
    outcome = teacher_pb2.SkillOutcome(
        trajectory_id=event.trajectory_id,
        task_type=event.task_type,
        skill_ids=event.skill_ids,
        is_success=event.is_success,
    )
    return teacher_pb2.SkillEvent(outcome=outcome)


def skill_event_from_proto(message: teacher_pb2.SkillEvent) -> SkillChoice | SkillOutcome:
    kind = message.WhichOneof("event")
    if kind is None:
        raise ContractError(
            "SkillEvent is neither a choice nor an outcome. The writer must set one."
        )
    event = getattr(message, kind)
    if kind == "choice":
        return SkillChoice(event.key, event.task_type, tuple(event.skill_ids))
    return SkillOutcome(
        event.trajectory_id, event.task_type, tuple(event.skill_ids), event.is_success
    )


# ---- stream entries


def _encode(message: Any) -> bytes:
    try:
        # Deterministic, since a map's fields are otherwise written in any order.
        data: bytes = message.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:  # Over protobuf's 2 GiB, mostly.
        raise ContractError(
            f"{message.DESCRIPTOR.name} cannot be written: {error}. Make it smaller."
        ) from error
    return data


def _decode(data: bytes, kind: Any, from_proto: Callable[[Any], T], stream: Stream) -> T:
    name = kind.DESCRIPTOR.name
    try:
        message = kind.FromString(data)
    except DecodeError as error:
        raise CorruptionError(
            f"Stream {stream.value}: {len(data)} bytes are no {name} ({error}). "
            "Find what else writes to this stream, or which version of it.",
            stream=stream.value,
        ) from error
    with _name_place(f"Stream {stream.value}, {name}", stream=stream.value):
        return from_proto(message)


def encode_task_group(group: TaskGroup) -> bytes:
    return _encode(task_group_to_proto(group))


def decode_task_group(data: bytes) -> TaskGroup:
    return _decode(data, task_pb2.TaskGroup, task_group_from_proto, Stream.TASKS)


def encode_trajectory(trajectory: Trajectory) -> bytes:
    return _encode(trajectory_to_proto(trajectory))


def decode_trajectory(data: bytes, stream: Stream = Stream.TRAJECTORIES) -> Trajectory:
    """`stream` is only named in errors; evaluation episodes travel on another one."""
    return _decode(data, trajectory_pb2.Trajectory, trajectory_from_proto, stream)


def encode_scored_trajectory(scored: ScoredTrajectory) -> bytes:
    return _encode(scored_trajectory_to_proto(scored))


def decode_scored_trajectory(data: bytes) -> ScoredTrajectory:
    return _decode(
        data, trajectory_pb2.ScoredTrajectory, scored_trajectory_from_proto, Stream.SCORED
    )


def encode_weights_manifest(manifest: WeightsManifest) -> bytes:
    return _encode(weights_manifest_to_proto(manifest))


def decode_weights_manifest(data: bytes) -> WeightsManifest:
    return _decode(
        data, policy_pb2.WeightsManifest, weights_manifest_from_proto, Stream.POLICY_UPDATES
    )


def encode_ledger_event(event: LedgerEvent) -> bytes:
    return _encode(ledger_event_to_proto(event))


def decode_ledger_event(data: bytes) -> LedgerEvent:
    return _decode(data, task_pb2.LedgerEvent, ledger_event_from_proto, Stream.LEDGER)


def encode_metric_record(record: MetricRecord) -> bytes:
    return _encode(metric_record_to_proto(record))


def decode_metric_record(data: bytes) -> MetricRecord:
    return _decode(data, gateway_pb2.MetricRecord, metric_record_from_proto, Stream.METRICS)


def encode_skill_event(event: SkillChoice | SkillOutcome) -> bytes:
    return _encode(skill_event_to_proto(event))


def decode_skill_event(data: bytes) -> SkillChoice | SkillOutcome:
    return _decode(data, teacher_pb2.SkillEvent, skill_event_from_proto, Stream.SKILL_EVENTS)
