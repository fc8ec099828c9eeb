"""The methods, one row each: what a method's loss is made of, and what follows for the run.

Whatever depends on a method (streams, processes, prompts, network policies) asks its row; no other
file compares a method's name. What a row names is a module of `sdar.algorithms`: a term of `terms`,
an advantage shaping of `shaping`, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.registry import index_by_name

AdvantageLevel = Literal["trajectory", "turn"]


class RlsdSettings(Protocol):
    @property
    def mixing(self) -> float: ...
    @property
    def decay_updates(self) -> int: ...
    @property
    def clip(self) -> float: ...


class LossSettings(Protocol):
    """The numbers that a loss reads: the `method` section of a run, `sdar.config.MethodConfig`.

    Meanings, defaults and bounds stand there and nowhere else. The losses see this type, since they
    import nothing but torch.
    """

    @property
    def name(self) -> str: ...
    @property
    def distillation_weight(self) -> float: ...
    @property
    def gate(self) -> str: ...
    @property
    def gate_sharpness(self) -> float: ...
    @property
    def kl_coefficient(self) -> float: ...
    @property
    def entropy_coefficient(self) -> float: ...
    @property
    def clip_low(self) -> float: ...
    @property
    def clip_high(self) -> float: ...
    @property
    def off_policy(self) -> str: ...
    @property
    def off_policy_cap(self) -> float: ...
    @property
    def weigh_distillation(self) -> bool: ...
    @property
    def rlsd(self) -> RlsdSettings: ...


@dataclass(frozen=True, slots=True)
class TermFacts:
    """What is known of a loss term without evaluating it."""

    coefficient: Callable[[LossSettings], float]
    """Weight of the term next to the others; at 0 it is not evaluated."""
    reads_reference: bool = False
    """Needs the log-probs of the frozen reference."""
    is_distillation: bool = False
    """Reads the teacher, counts scored tokens only, and learns where no advantage is left."""


_DISTILLATION = TermFacts(lambda settings: settings.distillation_weight, is_distillation=True)

TERM_FACTS: dict[str, TermFacts] = {
    "policy": TermFacts(lambda settings: 1.0),
    "kl": TermFacts(lambda settings: settings.kl_coefficient, reads_reference=True),
    "entropy": TermFacts(lambda settings: settings.entropy_coefficient),
    "sdar": _DISTILLATION,
    "constant_gate": _DISTILLATION,
    "opsd": _DISTILLATION,
    "skill_sd": _DISTILLATION,
}
"""Every loss term, by the name of its module in `sdar.algorithms.terms`."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method. All that a run has to know of it is here, or follows from what is here."""

    name: str
    terms: tuple[str, ...]
    """Summands of the loss, in the order in which they are added."""
    shaping: str | None = None
    """What the teacher's gap does to the advantages (`sdar.algorithms.shaping`), if anything."""
    reducer: str = "token"
    """Over which tokens the gap is brought together (`sdar.algorithms.reducers`)."""
    schedule: str = "constant"
    """How the teacher's weight changes over the updates (`sdar.algorithms.schedules`)."""
    student_sees_skills: bool = False
    """The rollout puts skills into the student's own prompt."""

    @property
    def learns_without_advantage(self) -> bool:
        """Whether a task group whose episodes all scored the same still teaches something.

        Where it does not, the learner may skip the group.
        """
        return any(TERM_FACTS[term].is_distillation for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether trajectories pass the teacher, which scores them, on their way to the learner."""
        return self.shaping is not None or self.learns_without_advantage

    @property
    def runs_teacher(self) -> bool:
        """Whether a teacher process runs: to score, or to hand skills to the student."""
        return self.needs_teacher or self.student_sees_skills


# What the methods share that train by advantages. OPSD has no policy term: it distils alone.
_GRPO = ("policy", "kl", "entropy")

METHODS = index_by_name(
    (
        Method("grpo", _GRPO),
        Method("sdar", (*_GRPO, "sdar")),
        Method("opsd", ("opsd", "kl", "entropy")),
        Method("grpo_opsd", (*_GRPO, "opsd")),
        Method("constant_gate", (*_GRPO, "constant_gate")),
        Method("rlsd", _GRPO, shaping="rlsd", schedule="rlsd_decay"),
        Method("skill_sd", (*_GRPO, "skill_sd")),
        Method("skill_grpo", _GRPO, student_sees_skills=True),
    )
)


def get_method(name: str) -> Method:
    """The row of the method called `name`. Raises ConfigurationError that names the known ones."""
    if name not in METHODS:
        raise ConfigurationError(f"Unknown method {name!r}. Known: {', '.join(sorted(METHODS))}.")
    return METHODS[name]


def needs_reference(settings: LossSettings) -> bool:
    """Whether a term is evaluated that reads the frozen reference."""
    # A term of coefficient 0 is not evaluated, so the learner need not load a second model for it.
    terms = [TERM_FACTS[name] for name in get_method(settings.name).terms]
    return any(term.reads_reference and term.coefficient(settings) > 0 for term in terms)
