"""Builds privileged prompts: what the student saw, with skills in the first user message.

The student's first turn and the teacher's, for the skill `skill clean : first use sink . after sink
put .`::

    student   <|im_start|>user\\n                         task : clean the mug ...<|im_end|>\\n
    teacher   <|im_start|>user\\nskill clean : ... put . task : clean the mug ...<|im_end|>\\n

A turn that extends the previous one has no prompt of its own: the tokens between two responses are
the student's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from sdar.algorithms.batching import TokenSequence, build_privileged_sequences
from sdar.contracts.errors import ContractError
from sdar.contracts.types import TokenIds, Trajectory
from sdar.model.chat import ChatTokenizer, place_skills
from services.teacher.retrieval import Retrieval, Retriever
from services.teacher.skills import format_skills


@dataclass(frozen=True, slots=True, eq=False)
class PrivilegedContext:
    """One trajectory behind privileged prompts.

    Attributes:
        fresh_prompts: turn index to privileged prompt [P], of the turns that begin a sequence.
        retrieval: what is really shown, after skills were dropped.
        num_tokens: of all sequences together, what scoring has to read.
        num_dropped_skills: specific skills that did not fit into the model's sequence length.
    """

    trajectory: Trajectory
    fresh_prompts: Mapping[int, TokenIds]
    retrieval: Retrieval
    num_tokens: int
    num_dropped_skills: int

    def build_sequences(self, trajectory_index: int) -> list[TokenSequence]:
        return build_privileged_sequences(self.trajectory, self.fresh_prompts, trajectory_index)


class ContextBuilder:
    """Retrieves skills for a trajectory's task and renders its privileged prompts.

    Args:
        max_sequence_tokens: most tokens of privileged prompt and response together.
    """

    def __init__(self, chat: ChatTokenizer, retriever: Retriever, max_sequence_tokens: int) -> None:
        self.chat = chat
        self.retriever = retriever
        self._max_sequence_tokens = max_sequence_tokens

    def build(self, trajectory: Trajectory) -> PrivilegedContext:
        """Privileged prompts of one trajectory.

        If they are too long, specific skills are dropped, the last one first.

        Raises:
            ContractError: the trajectory's prompts are not what its messages render to, so they
                cannot be rebuilt with skills; or it does not fit even without specific skills.
        """
        self._check_prompts(trajectory)
        retrieval = self.retriever.retrieve(trajectory.task, trajectory.group_id)
        num_retrieved = len(retrieval.specific)
        while True:
            prompts = self._render(trajectory, retrieval)
            sequences = build_privileged_sequences(trajectory, prompts)
            lengths = [sequence.num_tokens for sequence in sequences]
            if max(lengths, default=0) <= self._max_sequence_tokens:
                num_dropped = num_retrieved - len(retrieval.specific)
                return PrivilegedContext(trajectory, prompts, retrieval, sum(lengths), num_dropped)
            if not retrieval.specific:
                raise self._build_length_error(trajectory, retrieval, max(lengths))
            # The last one is the least fitting: they come best first.
            retrieval = replace(retrieval, specific=retrieval.specific[:-1])

    def _build_length_error(
        self, trajectory: Trajectory, retrieval: Retrieval, num_tokens: int
    ) -> ContractError:
        return ContractError(
            f"Trajectory {trajectory.trajectory_id}: {num_tokens} tokens with skills "
            f"{list(retrieval.skill_ids)} exceed model.max_sequence_tokens "
            f"{self._max_sequence_tokens}. Raise it, shorten the general skills, or lower "
            "rollout.max_response_tokens; privileged text is never cut.",
            trajectory_id=trajectory.trajectory_id,
        )

    def _render(self, trajectory: Trajectory, retrieval: Retrieval) -> dict[int, TokenIds]:
        skill_text = format_skills(retrieval.skills)
        return {
            turn.turn_index: self.chat.render_fresh(place_skills(turn.messages, skill_text))
            for turn in trajectory.turns
            if _is_fresh(turn.turn_index, turn.extends_previous)
        }

    def _check_prompts(self, trajectory: Trajectory) -> None:
        """Raises ContractError unless the messages render to the very tokens the student saw.

        Only then do the privileged prompts differ from the student's by the skills alone.
        """
        for turn in trajectory.turns:
            if not _is_fresh(turn.turn_index, turn.extends_previous):
                continue
            # Before they are rendered: a tokenizer takes long over a text of any size.
            self.chat.check_size(turn.messages, self._max_sequence_tokens)
            if not turn.messages or not np.array_equal(
                self.chat.render_fresh(turn.messages), turn.prompt_token_ids
            ):
                raise ContractError(
                    f"Trajectory {trajectory.trajectory_id} turn {turn.turn_index}: its "
                    f"{len(turn.prompt_token_ids)} prompt tokens are not what its "
                    f"{len(turn.messages)} messages render to with this teacher's chat template. "
                    "Give rollout and teacher the same model.path and model.template_date, and let "
                    "a fresh turn carry its whole prompt's messages.",
                    trajectory_id=trajectory.trajectory_id,
                    turn_index=turn.turn_index,
                )


def _is_fresh(turn_index: int, extends_previous: bool) -> bool:
    return turn_index == 0 or not extends_previous
