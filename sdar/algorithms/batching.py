"""The way from ragged turns to [B, T]: the only place where shapes are made.

One trajectory, two turns of which the second extends the first (p prompt, a response, d delta:
template text and observation)::

    turn 0   prompt p p p        response a a
    turn 1   prompt p p p a a d  response b
    sequence token_ids     p p p a a d b      one sequence: the shared prefix is scored once
             response_mask . . . 1 1 . 1      true exactly on sampled tokens
             turn_index          0 0   1      flat arrays: one value per sampled token

A micro-batch right-pads its sequences; a scorer's output, like every per-token tensor, is flat, in
row-major order of the mask's true entries, so nothing but the two inputs of the forward pass ever
holds padding::

    input_ids  p p p a a d b      response_mask  . . . 1 1 . 1      advantages  [a a b c]
               p p c 0 0 0 0                     . . 1 . . . .

Axes: L tokens of a sequence, B sequences of a micro-batch, T its longest, N sampled tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sdar.contracts.errors import ContractError
from sdar.contracts.types import ScoredTrajectory, TokenIds, Trajectory, Turn

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """What the model reads in one go, and one value per sampled token of it (N of L tokens)."""

    token_ids: Int[Array, " L"]
    response_mask: Bool[Array, " L"]
    behavior_logprobs: Float[Array, " N"]
    policy_versions: Int[Array, " N"]
    advantages: Float[Array, " N"]
    teacher_logprobs: Float[Array, " N"] | None
    """None for methods without a teacher."""
    turn_index: Int[Array, " N"]
    trajectory_index: int
    """Place of the trajectory in the list that the sequences were built from."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_response_tokens(self) -> int:
        return len(self.turn_index)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One forward and backward of one rank.

    Empty ones (N = 0: one row of one token, nothing sampled) keep ranks in step.
    """

    input_ids: Int[Tensor, "B T"]
    """0 right of a sequence's end."""
    response_mask: Bool[Tensor, "B T"]
    behavior_logprobs: Float[Tensor, " N"]
    policy_versions: Int[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    teacher_logprobs: Float[Tensor, " N"] | None
    trajectory_index: Int[Tensor, " N"]
    turn_index: Int[Tensor, " N"]
    max_rank_tokens: int
    """Most sampled tokens that any rank's micro-batch at this place holds; `TokenScorer` makes as
    many calls as that needs.
    """

    @property
    def num_response_tokens(self) -> int:
        return self.turn_index.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """The same micro-batch with every tensor on `device`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            name: v.to(device) if isinstance(v, Tensor) else v for name, v in fields.items()
        }
        return type(self)(**moved)


def build_sequences(
    items: Sequence[ScoredTrajectory], advantages: Sequence[Float[Array, " turns"]] | None = None
) -> list[TokenSequence]:
    """Sequences of all trajectories, in order; a sequence in which nothing was sampled is left out.

    Args:
        advantages: per trajectory one value per turn, spread over the turn's tokens; None gives
            zeros (scoring only).

    Raises:
        ContractError: a turn claims to extend the previous one and its prompt does not begin with
            it; a turn has no prompt; some trajectories have teacher scores and some have none.
    """
    if len({item.score is None for item in items}) > 1:
        raise ContractError(
            "Some trajectories of a batch have teacher scores and some have none. Score all or "
            "none."
        )
    sequences: list[TokenSequence] = []
    for index, item in enumerate(items):
        num_turns = len(item.trajectory.turns)
        values = np.zeros(num_turns) if advantages is None else advantages[index]
        if len(values) != num_turns:
            raise ContractError(
                f"Trajectory {item.trajectory.trajectory_id}: {len(values)} advantages for "
                f"{num_turns} turns. Pass one per turn."
            )
        teacher = None if item.score is None else item.score.turn_logprobs
        pieces = _split_prompts(item.trajectory)
        sequences += _join_turns(item.trajectory, index, pieces, values, teacher)
    return sequences


def build_privileged_sequences(
    trajectory: Trajectory, fresh_prompts: Mapping[int, TokenIds], trajectory_index: int = 0
) -> list[TokenSequence]:
    """The same sampled tokens behind other prompts: what a teacher with privileged context scores.

    Args:
        fresh_prompts: turn index to privileged prompt, for exactly the turns that do not extend the
            previous one. Turns that do keep their delta tokens, so the template text between two
            turns is identical to what the student saw.

    Raises:
        ContractError: a fresh turn without a prompt, or a prompt for a turn that continues.
    """
    pieces = _split_prompts(trajectory)
    fresh = {index for index, (is_fresh, _) in enumerate(pieces) if is_fresh}
    if set(fresh_prompts) != fresh:
        raise ContractError(
            f"Trajectory {trajectory.trajectory_id}: privileged prompts for turns "
            f"{sorted(fresh_prompts)}, but the turns that "
            f"begin a sequence are {sorted(fresh)}. Pass one prompt for each of those."
        )
    replaced = [
        (is_fresh, fresh_prompts[i] if is_fresh else tokens)
        for i, (is_fresh, tokens) in enumerate(pieces)
    ]
    # The tokens are scored, not trained on: they have no advantage.
    return _join_turns(trajectory, trajectory_index, replaced, np.zeros(len(pieces)), None)


def _split_prompts(trajectory: Trajectory) -> list[tuple[bool, TokenIds]]:
    """For each turn whether it begins a sequence, and its prompt without what is there already.

    Of a turn that begins a sequence that is the whole prompt, of any other the delta.
    """
    pieces: list[tuple[bool, TokenIds]] = []
    previous: Turn | None = None
    for turn in trajectory.turns:
        is_fresh = previous is None or not turn.extends_previous
        context = np.array([], np.int32)
        if previous is not None and not is_fresh:
            context = np.concatenate([previous.prompt_token_ids, previous.response_token_ids])
        # Compared, not believed: a wrong flag would train tokens behind a prompt nobody sampled at.
        if not np.array_equal(turn.prompt_token_ids[: len(context)], context):
            raise _build_extension_error(trajectory.trajectory_id, turn, len(context))
        pieces.append((is_fresh, turn.prompt_token_ids[len(context) :]))
        previous = turn
    return pieces


def _build_extension_error(trajectory_id: str, turn: Turn, num_context: int) -> ContractError:
    return ContractError(
        f"Trajectory {trajectory_id} turn {turn.turn_index}: extends_previous is set, but its "
        f"prompt of {len(turn.prompt_token_ids)} tokens does not begin with the {num_context} "
        "tokens of the previous turn. Append tokens to the previous prompt and response; never "
        "tokenize the conversation again.",
        trajectory_id=trajectory_id,
        turn_index=turn.turn_index,
    )


def _join_turns(
    trajectory: Trajectory,
    trajectory_index: int,
    pieces: Sequence[tuple[bool, TokenIds]],
    advantages: Float[Array, " turns"],
    teacher_logprobs: Sequence[Float[Array, " T"]] | None,
) -> list[TokenSequence]:
    """Cut the trajectory into runs of turns, one sequence each."""
    starts = [index for index, (is_fresh, _) in enumerate(pieces) if is_fresh]
    sequences = []
    for start, end in zip(starts, [*starts[1:], len(pieces)], strict=True):
        run = slice(start, end)
        turns = trajectory.turns[run]
        prompts = [tokens for _, tokens in pieces[run]]
        if len(prompts[0]) == 0:
            raise ContractError(
                f"Trajectory {trajectory.trajectory_id} turn {start} has an empty prompt: nothing "
                "predicts its first token. Begin every prompt with at least one token."
            )
        lengths = [len(turn.response_token_ids) for turn in turns]
        # Nothing was sampled in it, so there is nothing to score or to train on.
        if not sum(lengths):
            continue
        token_ids, response_mask = _interleave(prompts, turns)
        behavior = [turn.behavior_logprobs for turn in turns]
        versions = [turn.policy_versions for turn in turns]
        teacher = None if teacher_logprobs is None else np.concatenate(teacher_logprobs[run])
        sequences.append(
            TokenSequence(
                token_ids=token_ids,
                response_mask=response_mask,
                behavior_logprobs=np.concatenate(behavior),
                policy_versions=np.concatenate(versions),
                # One value for each turn becomes one for each of its sampled tokens.
                advantages=np.repeat(advantages[run], lengths).astype(np.float32),
                teacher_logprobs=teacher,
                turn_index=np.repeat(np.arange(start, end), lengths),
                trajectory_index=trajectory_index,
            )
        )
    return sequences


def _interleave(
    prompts: Sequence[TokenIds], turns: Sequence[Turn]
) -> tuple[Int[Array, " L"], Bool[Array, " L"]]:
    """Prompt, response, delta, response, ... as one sequence, and which of it was sampled."""
    parts = []
    for prompt, turn in zip(prompts, turns, strict=True):
        parts += [prompt, turn.response_token_ids]
    lengths = [len(part) for part in parts]
    is_response = [False, True] * len(turns)
    return np.concatenate(parts).astype(np.int64), np.repeat(is_response, lengths)


def build_microbatches(
    sequences: Sequence[TokenSequence], token_budget: int, num_ranks: int = 1
) -> list[list[MicroBatch]]:
    """Micro-batches of every rank, `result[rank][place]`: together they hold every sequence once.

    Every rank gets the same number of them, since each is a collective where weights are sharded.

    Sequences are sorted by length, longest first, so little is padding and the first micro-batch
    shows whether memory is enough. Neighbours in size go to the same place of different ranks, so
    ranks finish a place together.

    Args:
        token_budget: bound on B * T, padding included. A sequence longer than that alone makes its
            own micro-batch: dropping it would bias against long episodes.
    """
    if token_budget < 1 or num_ranks < 1:
        raise ContractError(
            f"token_budget {token_budget} and num_ranks {num_ranks} must be at least 1."
        )
    ordered = sorted(sequences, key=lambda sequence: sequence.num_tokens, reverse=True)
    bins = _fill_bins(ordered, token_budget)
    _even_out(bins, num_ranks)
    # Again, since halves were added at the end.
    bins.sort(key=lambda members: members[0].num_tokens, reverse=True)
    # Ranks that have nothing at the last place get an empty micro-batch: collectives need them all.
    bins += [[] for _ in range(-len(bins) % num_ranks)]
    has_teacher = any(sequence.teacher_logprobs is not None for sequence in sequences)
    return _deal(bins, num_ranks, has_teacher)


def _deal(
    bins: Sequence[Sequence[TokenSequence]], num_ranks: int, has_teacher: bool
) -> list[list[MicroBatch]]:
    """The bins as micro-batches, `num_ranks` neighbours to each place."""
    ranks: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    for place in range(0, len(bins), num_ranks):
        row = bins[place : place + num_ranks]
        max_rank_tokens = max(count_response_tokens(members) for members in row)
        for rank, members in enumerate(row):
            ranks[rank].append(_pad(members, max_rank_tokens, has_teacher))
    return ranks


def _fill_bins(ordered: Sequence[TokenSequence], token_budget: int) -> list[list[TokenSequence]]:
    """Longest first, so the first of a bin is what all of it is padded to."""
    bins: list[list[TokenSequence]] = []
    for sequence in ordered:
        if bins and (len(bins[-1]) + 1) * bins[-1][0].num_tokens <= token_budget:
            bins[-1].append(sequence)
        else:
            bins.append([sequence])
    return bins


def _even_out(bins: list[list[TokenSequence]], num_ranks: int) -> None:
    """Halve the fullest bins until every rank has as many.

    Half a micro-batch on each rank takes less time than a whole one on a single rank.
    """
    # Bins of one sequence can't be halved; where only such are left, some ranks stay empty.
    while bins and len(bins) % num_ranks and max(map(len, bins)) > 1:
        fullest = max(
            bins,
            key=lambda members: len(members) * members[0].num_tokens if len(members) > 1 else 0,
        )
        bins.append(fullest[len(fullest) // 2 :])
        del fullest[len(fullest) // 2 :]


def _pad(members: Sequence[TokenSequence], max_rank_tokens: int, has_teacher: bool) -> MicroBatch:
    def flat_field(name: str, dtype: type[np.generic]) -> Tensor:
        return _flatten((getattr(sequence, name) for sequence in members), dtype)

    indices = (np.full(s.num_response_tokens, s.trajectory_index) for s in members)
    teacher = [sequence.teacher_logprobs for sequence in members]
    if has_teacher and any(values is None for values in teacher):
        raise ContractError(
            "Some sequences of a batch have teacher log-probs and some have none. Score all or "
            "none."
        )
    input_ids, response_mask = _pad_right(members)
    return MicroBatch(
        input_ids=input_ids,
        response_mask=response_mask,
        behavior_logprobs=flat_field("behavior_logprobs", np.float32),
        policy_versions=flat_field("policy_versions", np.int64),
        advantages=flat_field("advantages", np.float32),
        teacher_logprobs=_flatten(teacher, np.float32) if has_teacher else None,
        trajectory_index=_flatten(indices, np.int64),
        turn_index=flat_field("turn_index", np.int64),
        max_rank_tokens=max_rank_tokens,
    )


def _pad_right(
    members: Sequence[TokenSequence],
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    num_rows = max(1, len(members))
    longest = max((sequence.num_tokens for sequence in members), default=1)
    input_ids = np.zeros((num_rows, longest), np.int64)
    response_mask = np.zeros((num_rows, longest), np.bool_)
    for row, sequence in enumerate(members):
        input_ids[row, : sequence.num_tokens] = sequence.token_ids
        response_mask[row, : sequence.num_tokens] = sequence.response_mask
    return torch.from_numpy(input_ids), torch.from_numpy(response_mask)


def _flatten(values: Iterable[Any], dtype: type[np.generic]) -> Tensor:
    """One after another; the empty array in front makes it work, with its type, for none."""
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *values]).astype(dtype))


def count_response_tokens(sequences: Iterable[TokenSequence]) -> int:
    """Sampled tokens of all `sequences`: the denominator of every loss term over a batch."""
    return sum(sequence.num_response_tokens for sequence in sequences)


def split_by_turn(
    micro_batches: Sequence[MicroBatch],
    values: Sequence[Float[Array, " N"]],
    num_turns: Sequence[int],
) -> list[tuple[Float[Array, " T"], ...]]:
    """Undo the batching of per-token values: for each trajectory one float32 array per turn.

    Args:
        values: for each micro-batch, its N values (a scorer's output).
        num_turns: turns of each trajectory, in the order the sequences were built from.

    Returns:
        arrays that are empty where nothing was sampled.
    """
    turns = [[np.empty(0, np.float32)] * count for count in num_turns]
    for micro_batch, flat in zip(micro_batches, values, strict=True):
        if len(flat) != micro_batch.num_response_tokens:
            raise ContractError(
                f"{len(flat)} values for {micro_batch.num_response_tokens} sampled tokens of a "
                "micro-batch."
            )
        for trajectory_index, turn_index, part in _cut_by_turn(micro_batch, flat):
            turns[trajectory_index][turn_index] = part
    return [tuple(arrays) for arrays in turns]


def _cut_by_turn(
    micro_batch: MicroBatch, flat: Float[Array, " N"]
) -> Iterator[tuple[int, int, Float[Array, " T"]]]:
    """(trajectory index, turn index, values) of each turn of a micro-batch."""
    if not len(flat):
        return
    keys = np.stack(
        [micro_batch.trajectory_index.cpu().numpy(), micro_batch.turn_index.cpu().numpy()]
    )
    # A turn is wholly in one sequence, so its values stand together: cut where the key changes.
    starts = np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1
    parts = np.split(np.asarray(flat, np.float32), starts)
    for part, start in zip(parts, [0, *starts], strict=True):
        yield keys[0, start], keys[1, start], part
