from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    PURPOSE_TRAIN: _ClassVar[Purpose]
    PURPOSE_EVALUATION: _ClassVar[Purpose]

class GroupOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GROUP_OUTCOME_UNSPECIFIED: _ClassVar[GroupOutcome]
    GROUP_OUTCOME_GENERATED: _ClassVar[GroupOutcome]
    GROUP_OUTCOME_TRAINED: _ClassVar[GroupOutcome]
    GROUP_OUTCOME_SKIPPED: _ClassVar[GroupOutcome]
    GROUP_OUTCOME_STALE: _ClassVar[GroupOutcome]
    GROUP_OUTCOME_FAILED: _ClassVar[GroupOutcome]
    GROUP_OUTCOME_CANCELLED: _ClassVar[GroupOutcome]
    GROUP_OUTCOME_ISSUED: _ClassVar[GroupOutcome]
PURPOSE_UNSPECIFIED: Purpose
PURPOSE_TRAIN: Purpose
PURPOSE_EVALUATION: Purpose
GROUP_OUTCOME_UNSPECIFIED: GroupOutcome
GROUP_OUTCOME_GENERATED: GroupOutcome
GROUP_OUTCOME_TRAINED: GroupOutcome
GROUP_OUTCOME_SKIPPED: GroupOutcome
GROUP_OUTCOME_STALE: GroupOutcome
GROUP_OUTCOME_FAILED: GroupOutcome
GROUP_OUTCOME_CANCELLED: GroupOutcome
GROUP_OUTCOME_ISSUED: GroupOutcome

class Task(_message.Message):
    __slots__ = ("environment", "split", "task_id", "task_type", "description", "seed")
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    environment: str
    split: str
    task_id: str
    task_type: str
    description: str
    seed: int
    def __init__(self, environment: _Optional[str] = ..., split: _Optional[str] = ..., task_id: _Optional[str] = ..., task_type: _Optional[str] = ..., description: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class SamplingParameters(_message.Message):
    __slots__ = ("temperature", "top_p", "max_response_tokens")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MAX_RESPONSE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    max_response_tokens: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., max_response_tokens: _Optional[int] = ...) -> None: ...

class TaskGroup(_message.Message):
    __slots__ = ("run_id", "group_id", "task", "group_size", "purpose", "admitted_version", "sampling", "max_turns", "environment_address", "evaluation_id")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TURNS_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    group_id: str
    task: Task
    group_size: int
    purpose: Purpose
    admitted_version: int
    sampling: SamplingParameters
    max_turns: int
    environment_address: str
    evaluation_id: str
    def __init__(self, run_id: _Optional[str] = ..., group_id: _Optional[str] = ..., task: _Optional[_Union[Task, _Mapping]] = ..., group_size: _Optional[int] = ..., purpose: _Optional[_Union[Purpose, str]] = ..., admitted_version: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParameters, _Mapping]] = ..., max_turns: _Optional[int] = ..., environment_address: _Optional[str] = ..., evaluation_id: _Optional[str] = ...) -> None: ...

class LedgerEvent(_message.Message):
    __slots__ = ("run_id", "group_id", "outcome", "num_trajectories", "policy_version", "reason", "episode_turns", "stage")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    NUM_TRAJECTORIES_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EPISODE_TURNS_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    group_id: str
    outcome: GroupOutcome
    num_trajectories: int
    policy_version: int
    reason: str
    episode_turns: _containers.RepeatedScalarFieldContainer[int]
    stage: str
    def __init__(self, run_id: _Optional[str] = ..., group_id: _Optional[str] = ..., outcome: _Optional[_Union[GroupOutcome, str]] = ..., num_trajectories: _Optional[int] = ..., policy_version: _Optional[int] = ..., reason: _Optional[str] = ..., episode_turns: _Optional[_Iterable[int]] = ..., stage: _Optional[str] = ...) -> None: ...
