from sdar.v1 import task_pb2 as _task_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StopReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_REASON_UNSPECIFIED: _ClassVar[StopReason]
    STOP_REASON_END_OF_TURN: _ClassVar[StopReason]
    STOP_REASON_LENGTH: _ClassVar[StopReason]

class EpisodeEnd(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EPISODE_END_UNSPECIFIED: _ClassVar[EpisodeEnd]
    EPISODE_END_TERMINATED: _ClassVar[EpisodeEnd]
    EPISODE_END_TRUNCATED: _ClassVar[EpisodeEnd]
STOP_REASON_UNSPECIFIED: StopReason
STOP_REASON_END_OF_TURN: StopReason
STOP_REASON_LENGTH: StopReason
EPISODE_END_UNSPECIFIED: EpisodeEnd
EPISODE_END_TERMINATED: EpisodeEnd
EPISODE_END_TRUNCATED: EpisodeEnd

class EnvironmentIdentity(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ModelIdentity(_message.Message):
    __slots__ = ("name", "fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class PolicyVersionSpan(_message.Message):
    __slots__ = ("policy_version", "num_tokens")
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    policy_version: int
    num_tokens: int
    def __init__(self, policy_version: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("num_prefix_tokens", "packed_prompt_suffix", "messages", "extends_previous", "packed_response_token_ids", "packed_behavior_logprobs", "policy_version_spans", "response_text", "stop_reason", "action", "is_action_valid", "reward", "reward_components")
    class RewardComponentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NUM_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PACKED_PROMPT_SUFFIX_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    EXTENDS_PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    PACKED_RESPONSE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PACKED_BEHAVIOR_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_SPANS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TEXT_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    IS_ACTION_VALID_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    REWARD_COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    num_prefix_tokens: int
    packed_prompt_suffix: bytes
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    extends_previous: bool
    packed_response_token_ids: bytes
    packed_behavior_logprobs: bytes
    policy_version_spans: _containers.RepeatedCompositeFieldContainer[PolicyVersionSpan]
    response_text: str
    stop_reason: StopReason
    action: str
    is_action_valid: bool
    reward: float
    reward_components: _containers.ScalarMap[str, float]
    def __init__(self, num_prefix_tokens: _Optional[int] = ..., packed_prompt_suffix: _Optional[bytes] = ..., messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., extends_previous: _Optional[bool] = ..., packed_response_token_ids: _Optional[bytes] = ..., packed_behavior_logprobs: _Optional[bytes] = ..., policy_version_spans: _Optional[_Iterable[_Union[PolicyVersionSpan, _Mapping]]] = ..., response_text: _Optional[str] = ..., stop_reason: _Optional[_Union[StopReason, str]] = ..., action: _Optional[str] = ..., is_action_valid: _Optional[bool] = ..., reward: _Optional[float] = ..., reward_components: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Trajectory(_message.Message):
    __slots__ = ("run_id", "group_id", "trajectory_id", "attempt", "episode_index", "group_size", "task", "purpose", "environment", "model", "sampling", "turns", "end", "is_success", "evaluation_id", "duration_s")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    TRAJECTORY_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EPISODE_INDEX_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    IS_SUCCESS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_ID_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    group_id: str
    trajectory_id: str
    attempt: int
    episode_index: int
    group_size: int
    task: _task_pb2.Task
    purpose: _task_pb2.Purpose
    environment: EnvironmentIdentity
    model: ModelIdentity
    sampling: _task_pb2.SamplingParameters
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    end: EpisodeEnd
    is_success: bool
    evaluation_id: str
    duration_s: float
    def __init__(self, run_id: _Optional[str] = ..., group_id: _Optional[str] = ..., trajectory_id: _Optional[str] = ..., attempt: _Optional[int] = ..., episode_index: _Optional[int] = ..., group_size: _Optional[int] = ..., task: _Optional[_Union[_task_pb2.Task, _Mapping]] = ..., purpose: _Optional[_Union[_task_pb2.Purpose, str]] = ..., environment: _Optional[_Union[EnvironmentIdentity, _Mapping]] = ..., model: _Optional[_Union[ModelIdentity, _Mapping]] = ..., sampling: _Optional[_Union[_task_pb2.SamplingParameters, _Mapping]] = ..., turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ..., end: _Optional[_Union[EpisodeEnd, str]] = ..., is_success: _Optional[bool] = ..., evaluation_id: _Optional[str] = ..., duration_s: _Optional[float] = ...) -> None: ...

class TeacherScore(_message.Message):
    __slots__ = ("trajectory_id", "teacher_version", "packed_turn_logprobs", "skill_ids", "num_specific_skills", "skill_library_hash", "template_hash", "retrieval", "scorer")
    TRAJECTORY_ID_FIELD_NUMBER: _ClassVar[int]
    TEACHER_VERSION_FIELD_NUMBER: _ClassVar[int]
    PACKED_TURN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SKILL_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_SPECIFIC_SKILLS_FIELD_NUMBER: _ClassVar[int]
    SKILL_LIBRARY_HASH_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_HASH_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    trajectory_id: str
    teacher_version: int
    packed_turn_logprobs: _containers.RepeatedScalarFieldContainer[bytes]
    skill_ids: _containers.RepeatedScalarFieldContainer[str]
    num_specific_skills: int
    skill_library_hash: str
    template_hash: str
    retrieval: str
    scorer: str
    def __init__(self, trajectory_id: _Optional[str] = ..., teacher_version: _Optional[int] = ..., packed_turn_logprobs: _Optional[_Iterable[bytes]] = ..., skill_ids: _Optional[_Iterable[str]] = ..., num_specific_skills: _Optional[int] = ..., skill_library_hash: _Optional[str] = ..., template_hash: _Optional[str] = ..., retrieval: _Optional[str] = ..., scorer: _Optional[str] = ...) -> None: ...

class ScoredTrajectory(_message.Message):
    __slots__ = ("trajectory", "score")
    TRAJECTORY_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    trajectory: Trajectory
    score: TeacherScore
    def __init__(self, trajectory: _Optional[_Union[Trajectory, _Mapping]] = ..., score: _Optional[_Union[TeacherScore, _Mapping]] = ...) -> None: ...
