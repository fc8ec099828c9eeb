"""The domain types that every service uses: frozen dataclasses that check their own lengths.

They never do I/O and know no wire format.

Axes: T response tokens of one turn, P prompt tokens of one turn.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from sdar.contracts.errors import ContractError

TokenIds = npt.NDArray[np.int32]
LogProbs = npt.NDArray[np.float32]
PolicyVersions = npt.NDArray[np.int32]


def _as_array(value: Any, dtype: type[np.generic]) -> npt.NDArray[Any]:
    array = np.ascontiguousarray(value, dtype=dtype)
    if array.ndim != 1:
        raise ContractError(
            f"Expected a flat array of {np.dtype(dtype).name}, got shape {array.shape}. Flatten it "
            "first."
        )
    # Records are shared between tasks and threads, so nobody may write into one.
    array.setflags(write=False)
    return array


class _ArrayEq:
    """Equality by value for dataclasses that hold arrays.

    The generated method would ask an array whether it is true, which numpy refuses.
    """

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, np.ndarray):
                # A NaN equals a NaN here: what was encoded and decoded again must compare equal.
                if not np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f"):
                    return False
            elif mine != theirs:
                return False
        return True

    __hash__ = None  # type: ignore[assignment]


class Purpose(StrEnum):
    """Why an episode is played. Evaluation episodes never reach the learner."""

    TRAIN = "train"
    EVALUATION = "evaluation"


class StopReason(StrEnum):
    """Why the sampler stopped a turn's response."""

    END_OF_TURN = "end_of_turn"
    LENGTH = "length"


class EpisodeEnd(StrEnum):
    """How an episode ended: by the environment's own rule, or cut by a limit on turns or tokens."""

    TERMINATED = "terminated"
    TRUNCATED = "truncated"


class GroupOutcome(StrEnum):
    """What became of a task group.

    `ISSUED` opens its account and `GENERATED` ends its playing. Each of the others closes the
    account, which happens once.
    """

    ISSUED = "issued"
    GENERATED = "generated"
    TRAINED = "trained"
    SKIPPED = "skipped"
    """No training signal: every episode earned the same return and the method has no other term."""
    STALE = "stale"
    FAILED = "failed"
    CANCELLED = "cancelled"


class FailureStage(StrEnum):
    """Where on its way a task group failed."""

    ROLLOUT = "rollout"
    ENVIRONMENT = "environment"
    TEACHER = "teacher"
    LEARNER = "learner"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """temperature 0 is greedy. max_response_tokens bounds one turn."""

    temperature: float
    top_p: float
    max_response_tokens: int


@dataclass(frozen=True, slots=True)
class EnvironmentIdentity:
    """Which simulator produced the rewards: a name and the version it reports of itself."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model sampled: its name and a hash over its configuration and tokenizer files.

    The weights are not part of it, since they have versions.
    """

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Task:
    """One problem of an environment.

    `description` is the task's own sentence, and all that skill retrieval reads of a task.
    """

    environment: str
    split: str
    task_id: str
    task_type: str
    description: str
    seed: int


@dataclass(frozen=True, slots=True)
class TaskGroup:
    """One task played `group_size` times.

    `admitted_version` is the newest policy version when the group was issued. An evaluation group
    is pinned to it.
    """

    run_id: str
    group_id: str
    task: Task
    group_size: int
    purpose: Purpose
    admitted_version: int
    sampling: SamplingParameters
    max_turns: int
    environment_address: str
    evaluation_id: str = ""

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.max_turns < 1:
            raise ContractError(
                f"Task group {self.group_id}: group_size {self.group_size} and max_turns "
                f"{self.max_turns} must be at least 1."
            )


_TURN_ARRAYS = (
    ("prompt_token_ids", np.int32),
    ("response_token_ids", np.int32),
    ("behavior_logprobs", np.float32),
    ("policy_versions", np.int32),
)


@dataclass(frozen=True, slots=True, eq=False)
class Turn(_ArrayEq):
    """One prompt and the response sampled for it.

    Attributes:
        prompt_token_ids: [P] the whole prompt the sampler saw, history included.
        messages: the chat messages this turn added to the prompt; with `extends_previous` they
            stand behind the previous response, otherwise they are the whole prompt.
        extends_previous: the prompt begins with the previous turn's prompt and response, token by
            token.
        response_token_ids, behavior_logprobs, policy_versions: [T] sampled tokens, the sampler's
            log-prob of each under the distribution it was drawn from, and the policy version that
            sampled each.
        reward: scalar reward of the step; reward_components are its named parts.
    """

    turn_index: int
    prompt_token_ids: TokenIds
    messages: tuple[ChatMessage, ...]
    extends_previous: bool
    response_token_ids: TokenIds
    behavior_logprobs: LogProbs
    policy_versions: PolicyVersions
    response_text: str
    stop_reason: StopReason
    action: str
    is_action_valid: bool
    reward: float
    reward_components: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in _TURN_ARRAYS:
            # The one way to set a field of a frozen dataclass.
            object.__setattr__(self, name, _as_array(getattr(self, name), dtype))
        self._check_lengths()
        self._check_numbers()

    def _check_lengths(self) -> None:
        num_tokens = len(self.response_token_ids)
        for name in ("behavior_logprobs", "policy_versions"):
            if len(getattr(self, name)) != num_tokens:
                raise ContractError(
                    f"Turn {self.turn_index}: {len(getattr(self, name))} {name} for {num_tokens} "
                    "sampled tokens. Return one value per token from the sampler.",
                    turn_index=self.turn_index,
                )

    def _check_numbers(self) -> None:
        if not np.isfinite(self.behavior_logprobs).all():
            raise ContractError(
                f"Turn {self.turn_index}: behavior_logprobs hold a value that is not finite. "
                "A sampled token has a finite log-prob; check the sampler's temperature and top_p."
            )
        if not np.isfinite(self.reward):
            raise ContractError(
                f"Turn {self.turn_index}: reward {self.reward} is not finite. Fix the "
                "environment's reward."
            )


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One finished episode with everything training needs to know about how it came to be."""

    run_id: str
    group_id: str
    trajectory_id: str
    attempt: int
    episode_index: int
    group_size: int
    task: Task
    purpose: Purpose
    environment: EnvironmentIdentity
    model: ModelIdentity
    sampling: SamplingParameters
    turns: tuple[Turn, ...]
    end: EpisodeEnd
    is_success: bool
    evaluation_id: str = ""
    duration_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.turns:
            raise ContractError(
                f"Trajectory {self.trajectory_id} has no turns. Drop episodes that never produced "
                "a response."
            )
        if not 0 <= self.episode_index < self.group_size:
            raise ContractError(
                f"Trajectory {self.trajectory_id}: episode_index {self.episode_index} outside its "
                f"group of {self.group_size}."
            )
        for index, turn in enumerate(self.turns):
            if turn.turn_index != index:
                raise ContractError(
                    f"Trajectory {self.trajectory_id}: turn {index} carries turn_index "
                    f"{turn.turn_index}."
                )

    @property
    def episode_return(self) -> float:
        """Sum of the turns' rewards, undiscounted."""
        return float(sum(turn.reward for turn in self.turns))

    @property
    def num_response_tokens(self) -> int:
        return sum(len(turn.response_token_ids) for turn in self.turns)

    @property
    def min_policy_version(self) -> int:
        """The oldest policy version among the sampled tokens: what staleness is measured from."""
        # A turn whose response is empty has no version.
        return min(
            (int(turn.policy_versions.min()) for turn in self.turns if len(turn.policy_versions)),
            default=0,
        )

    @property
    def max_policy_version(self) -> int:
        return max(
            (int(turn.policy_versions.max()) for turn in self.turns if len(turn.policy_versions)),
            default=0,
        )


@dataclass(frozen=True, slots=True, eq=False)
class TeacherScore(_ArrayEq):
    """Log-probs of a trajectory's sampled tokens under the privileged context, and that context.

    `turn_logprobs[i]` is [T_i], aligned with turn i's response tokens.
    """

    trajectory_id: str
    teacher_version: int
    turn_logprobs: tuple[LogProbs, ...]
    skill_ids: tuple[str, ...]
    num_specific_skills: int
    skill_library_hash: str
    template_hash: str
    retrieval: str
    scorer: str

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "turn_logprobs",
            tuple(_as_array(values, np.float32) for values in self.turn_logprobs),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TeacherScore):
            return NotImplemented
        same = all(
            getattr(self, f.name) == getattr(other, f.name)
            for f in dataclasses.fields(self)
            if f.name != "turn_logprobs"
        )
        # As lists: turns have different lengths, so they are no one array.
        mine = [values.tolist() for values in self.turn_logprobs]
        theirs = [values.tolist() for values in other.turn_logprobs]
        return same and mine == theirs

    __hash__ = None


@dataclass(frozen=True, slots=True)
class ScoredTrajectory:
    """A trajectory and its teacher score; `score` is None for methods without a teacher."""

    trajectory: Trajectory
    score: TeacherScore | None

    def __post_init__(self) -> None:
        if self.score is None:
            return
        if self.score.trajectory_id != self.trajectory.trajectory_id:
            raise ContractError(
                f"Score of {self.score.trajectory_id} attached to trajectory "
                f"{self.trajectory.trajectory_id}."
            )
        want = [len(turn.response_token_ids) for turn in self.trajectory.turns]
        got = [len(values) for values in self.score.turn_logprobs]
        if want != got:
            raise ContractError(
                f"Trajectory {self.trajectory.trajectory_id}: teacher log-probs per turn {got} for "
                f"sampled tokens {want}. Score exactly the sampled tokens."
            )


@dataclass(frozen=True, slots=True)
class SkillChoice:
    """Skills that retrieval by utility chose for all episodes of one task group.

    `key` is the group's id. Of several choices with one key the first stands.
    """

    key: str
    task_type: str
    skill_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SkillOutcome:
    """How an episode ended whose teacher was shown these specific skills.

    A trajectory counts once, even if its outcome is published several times.
    """

    trajectory_id: str
    task_type: str
    skill_ids: tuple[str, ...]
    is_success: bool


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a published model.

    `sha256` is over the raw little-endian bytes of the whole tensor. With `is_delta` the shard
    holds only the elements that differ from the manifest's base version; the hash is still of the
    whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    sha256: str
    is_delta: bool = False


@dataclass(frozen=True, slots=True)
class WeightsManifest:
    """What one policy version consists of. `path` is relative to the weight store's root.

    `num_updates`: optimizer updates these weights have seen; a crash that loses updates leaves it
    behind `policy_version`. `base_version`: what delta tensors are relative to, None where every
    tensor is whole.
    """

    run_id: str
    policy_version: int
    path: str
    tensors: tuple[TensorEntry, ...]
    size_bytes: int
    model: ModelIdentity
    created_at_s: float
    num_updates: int = 0
    base_version: int | None = None

    def __post_init__(self) -> None:
        if self.policy_version < 0:
            raise ContractError(
                f"Weights manifest with policy_version {self.policy_version}; versions count from "
                "0."
            )


@dataclass(frozen=True, slots=True)
class LedgerEvent:
    """One step of a task group's account (`sdar.bus.ledger`).

    Attributes:
        episode_turns: the number of turns of each episode, with GENERATED and TRAINED only.
        stage: a `FailureStage`, with FAILED only; empty otherwise. A text, so that a reader
            survives the stage of a newer writer.
    """

    run_id: str
    group_id: str
    outcome: GroupOutcome
    num_trajectories: int
    policy_version: int
    reason: str = ""
    episode_turns: tuple[int, ...] = ()
    stage: str = ""


@dataclass(frozen=True, slots=True)
class MetricRecord:
    """A service's measurements at one moment.

    `policy_version` is the version they belong to, or -1 for none.
    """

    run_id: str
    service: str
    instance: str
    policy_version: int
    at_s: float
    values: dict[str, float]
