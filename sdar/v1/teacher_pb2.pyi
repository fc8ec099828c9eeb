from sdar.v1 import task_pb2 as _task_pb2
from sdar.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "trajectory", "min_teacher_version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRAJECTORY_FIELD_NUMBER: _ClassVar[int]
    MIN_TEACHER_VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    trajectory: _trajectory_pb2.Trajectory
    min_teacher_version: int
    def __init__(self, request_id: _Optional[str] = ..., trajectory: _Optional[_Union[_trajectory_pb2.Trajectory, _Mapping]] = ..., min_teacher_version: _Optional[int] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("request_id", "score")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    score: _trajectory_pb2.TeacherScore
    def __init__(self, request_id: _Optional[str] = ..., score: _Optional[_Union[_trajectory_pb2.TeacherScore, _Mapping]] = ...) -> None: ...

class RetrieveSkillsRequest(_message.Message):
    __slots__ = ("task", "key")
    TASK_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    task: _task_pb2.Task
    key: str
    def __init__(self, task: _Optional[_Union[_task_pb2.Task, _Mapping]] = ..., key: _Optional[str] = ...) -> None: ...

class RetrieveSkillsResponse(_message.Message):
    __slots__ = ("skill_ids", "num_specific_skills", "text", "skill_library_hash", "template_hash", "retrieval")
    SKILL_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_SPECIFIC_SKILLS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SKILL_LIBRARY_HASH_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_HASH_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_FIELD_NUMBER: _ClassVar[int]
    skill_ids: _containers.RepeatedScalarFieldContainer[str]
    num_specific_skills: int
    text: str
    skill_library_hash: str
    template_hash: str
    retrieval: str
    def __init__(self, skill_ids: _Optional[_Iterable[str]] = ..., num_specific_skills: _Optional[int] = ..., text: _Optional[str] = ..., skill_library_hash: _Optional[str] = ..., template_hash: _Optional[str] = ..., retrieval: _Optional[str] = ...) -> None: ...

class SkillEvent(_message.Message):
    __slots__ = ("choice", "outcome")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    choice: SkillChoice
    outcome: SkillOutcome
    def __init__(self, choice: _Optional[_Union[SkillChoice, _Mapping]] = ..., outcome: _Optional[_Union[SkillOutcome, _Mapping]] = ...) -> None: ...

class SkillChoice(_message.Message):
    __slots__ = ("key", "task_type", "skill_ids")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    SKILL_IDS_FIELD_NUMBER: _ClassVar[int]
    key: str
    task_type: str
    skill_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, key: _Optional[str] = ..., task_type: _Optional[str] = ..., skill_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class SkillOutcome(_message.Message):
    __slots__ = ("trajectory_id", "task_type", "skill_ids", "is_success")
    TRAJECTORY_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    SKILL_IDS_FIELD_NUMBER: _ClassVar[int]
    IS_SUCCESS_FIELD_NUMBER: _ClassVar[int]
    trajectory_id: str
    task_type: str
    skill_ids: _containers.RepeatedScalarFieldContainer[str]
    is_success: bool
    def __init__(self, trajectory_id: _Optional[str] = ..., task_type: _Optional[str] = ..., skill_ids: _Optional[_Iterable[str]] = ..., is_success: _Optional[bool] = ...) -> None: ...
