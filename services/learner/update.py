"""One update of the policy on all ranks: minibatches, their log-probs, optimizer steps, metrics.

`Trainer` is the same object on every rank. Rank 0 calls its methods; each broadcasts its arguments
(the trajectories as the bytes they arrived in) and then runs on all ranks alike, each taking its
share of the micro-batches. The others sit in `follow`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from sdar.algorithms.batching import (
    MicroBatch,
    TokenSequence,
    build_microbatches,
    build_sequences,
    count_response_tokens,
)
from sdar.algorithms.loss import compute_loss, reduce_metrics
from sdar.algorithms.terms import Metrics
from sdar.config import RunConfig
from sdar.contracts.errors import CapacityError
from sdar.contracts.methods import needs_reference
from sdar.contracts.types import ScoredTrajectory
from services.learner.checkpoint import read_rank_shard, write_rank_shard
from services.learner.ingest import compute_group_advantages, decode_item
from services.learner.model import PolicyModel
from services.learner.ranks import Ranks

log = structlog.get_logger()

Items = Sequence[ScoredTrajectory]


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What one update came to.

    Attributes:
        measured: means over the tokens of the optimizer steps that were taken.
        tensors: the new weights for publishing; none if every step was skipped.
        skipped: whether each optimizer step was skipped, in order.
        refused: places of the groups whose step was skipped; of all groups if every step was.
    """

    measured: dict[str, float]
    tensors: dict[str, Tensor]
    skipped: tuple[bool, ...] = ()
    refused: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class _Minibatch:
    """One optimizer step: the places of its groups, this rank's micro-batches and the token count
    over all ranks.
    """

    places: range
    micro_batches: list[MicroBatch]
    num_tokens_global: int


class Trainer:
    """The torch side of the learner. Not thread-safe: rank 0 calls it from one thread."""

    def __init__(self, config: RunConfig, model: PolicyModel, ranks: Ranks) -> None:
        self.config = config
        self.model = model
        self._ranks = ranks

    # ---- what rank 0 calls

    def update(
        self,
        groups: Sequence[tuple[Items, Sequence[bytes]]],
        *,
        update_index: int,
        policy_version: int,
    ) -> UpdateResult:
        """Train on whole groups, each given decoded and as bytes.

        Args:
            update_index: updates done before this one.
            policy_version: of the weights the update begins with.
        """
        frames = [payload for _, payloads in groups for payload in payloads]
        self._ranks.broadcast_command(
            {
                "do": "update",
                "group_sizes": [len(items) for items, _ in groups],
                "update_index": update_index,
                "policy_version": policy_version,
            },
            # Alone, nobody would decode them.
            frames if self._ranks.world_size > 1 else (),
        )
        return self._update([items for items, _ in groups], update_index, policy_version)

    def export(self) -> dict[str, Tensor]:
        """The weights as they are."""
        self._ranks.broadcast_command({"do": "export"})
        return self.model.export()

    def save(self, directory: Path) -> None:
        """Every rank writes its part of a checkpoint into `directory`."""
        self._ranks.broadcast_command({"do": "save", "directory": str(directory)})
        self._save(directory)

    def beat(self) -> int:
        """Show the other ranks that this one lives; returns how many of them are asked to leave."""
        self._ranks.broadcast_command({"do": "beat"})
        return self._ranks.count_leaving(False)

    def stop(self) -> None:
        """Let the other ranks return from `follow`, and release the model."""
        self._ranks.broadcast_command({"do": "stop"})
        self.model.close()

    # ---- what the other ranks do

    def follow(
        self,
        beat: Callable[[], None] = lambda: None,
        is_leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        """Carry out what rank 0 says until it says stop.

        Args:
            beat: called at every command.
            is_leaving: whether this rank is asked to leave; rank 0 learns of it and drains.
        """
        while True:
            command, frames = self._ranks.broadcast_command(None)
            beat()
            if command["do"] == "stop":
                return self.model.close()
            if command["do"] == "beat":
                self._ranks.count_leaving(is_leaving())
            else:
                self._carry_out(command, frames)

    def _carry_out(self, command: dict[str, Any], frames: Sequence[bytes]) -> None:
        if command["do"] == "update":
            groups = self._decode_groups(frames, command["group_sizes"])
            self._update(groups, command["update_index"], command["policy_version"])
        elif command["do"] == "export":
            self.model.export()
        else:
            self._save_or_wait(Path(command["directory"]))

    def _decode_groups(self, frames: Sequence[bytes], sizes: Sequence[int]) -> list[Items]:
        needs_teacher = self.config.needs_teacher
        items = [decode_item(frame, needs_teacher=needs_teacher) for frame in frames]
        groups: list[Items] = []
        start = 0
        for size in sizes:
            groups.append(items[start : start + size])
            start += size
        return groups

    def _save_or_wait(self, directory: Path) -> None:
        try:
            self._save(directory)
        except CapacityError as error:
            # Rank 0 has got the error, too, and says when to try again.
            log.error("checkpoint_refused", directory=str(directory), error=error.message)

    # ---- on every rank

    def _update(
        self, groups: Sequence[Items], update_index: int, policy_version: int
    ) -> UpdateResult:
        """What every rank does alike: score everything with the weights as they are, then step."""
        minibatches = list(self._build_minibatches(groups))
        references, proximal = self._score(minibatches)
        learning_rate = self._learning_rate(update_index)
        totals = _Totals()
        skipped: list[bool] = []
        for minibatch, ref_logprobs, proximal_logprobs in zip(
            minibatches, references, proximal, strict=True
        ):
            compute = partial(
                compute_loss,
                num_tokens_global=minibatch.num_tokens_global,
                settings=self.config.method,
                update_index=update_index,
                learner_version=policy_version,
            )
            loss = _BatchLoss(compute, ref_logprobs, proximal_logprobs, _Totals())
            norm = self.model.train_step(minibatch.micro_batches, loss.compute_share, learning_rate)
            # Every rank has the same norm, so all go on alike.
            skipped.append(not math.isfinite(norm))
            if math.isfinite(norm):
                totals.merge(loss.totals, norm)
        measured = totals.reduce(self._ranks) | {"learning_rate": learning_rate}
        return self._conclude(measured, minibatches, skipped, len(groups))

    def _conclude(
        self,
        measured: dict[str, float],
        minibatches: Sequence[_Minibatch],
        skipped: Sequence[bool],
        num_groups: int,
    ) -> UpdateResult:
        if skipped and all(skipped):
            # The weights are those of before: there is nothing to publish.
            return UpdateResult(measured, {}, tuple(skipped), frozenset(range(num_groups)))
        refused: set[int] = set()
        for minibatch in itertools.compress(minibatches, skipped):
            refused.update(minibatch.places)
        return UpdateResult(measured, self.model.export(), tuple(skipped), frozenset(refused))

    def _score(
        self, minibatches: Sequence[_Minibatch]
    ) -> tuple[list[list[Tensor] | None], list[list[Tensor] | None]]:
        """Reference and proximal log-probs of each minibatch; None where they aren't needed."""
        references = [self.model.compute_ref_logprobs(each.micro_batches) for each in minibatches]
        # The first step starts from the proximal policy itself, so only later ones need it scored.
        proximal: list[list[Tensor] | None] = [None for _ in minibatches[:1]]
        later = minibatches[1:]
        proximal += [self.model.compute_policy_logprobs(each.micro_batches) for each in later]
        return references, proximal

    def _build_minibatches(self, groups: Sequence[Items]) -> Iterator[_Minibatch]:
        """Split the groups over the optimizer steps; a step without a sampled token is left out."""
        training = self.config.training
        for places in _split_evenly(len(groups), training.num_minibatches):
            sequences: list[TokenSequence] = []
            for items in groups[places.start : places.stop]:
                sequences += build_sequences(items, compute_group_advantages(self.config, items))
            if not sequences:
                continue
            # Every rank builds all of them alike and takes its own: nothing else has to be sent.
            ranks = build_microbatches(
                sequences, training.microbatch_tokens, self._ranks.world_size
            )
            own = [micro_batch.to(self.model.device) for micro_batch in ranks[self._ranks.rank]]
            yield _Minibatch(places, own, count_response_tokens(sequences))

    def _learning_rate(self, update_index: int) -> float:
        """A function of the update's number alone: a checkpoint need hold no scheduler."""
        training = self.config.training
        return training.learning_rate * min(
            1.0, (update_index + 1) / max(1, training.warmup_updates)
        )

    def _save(self, directory: Path) -> None:
        error: CapacityError | None = None
        # Collective under ZeRO-3, so outside what may fail on one rank alone.
        weights = self.model.export()
        try:
            tensors, num_steps = self.model.export_optimizer()
            write_rank_shard(directory, self._ranks, weights, tensors, num_steps, self.model.device)
        except CapacityError as caught:
            error = caught
        self._ranks.raise_together(error, f"Writing checkpoint {directory.name}")


def build_trainer(config: RunConfig, ranks: Ranks, checkpoint: Path | None) -> Trainer:
    """The trainer of one rank, from `model.path` or from a checkpoint that was found intact."""
    from safetensors.torch import load_file

    torch.manual_seed(config.seed)
    model = PolicyModel(
        config.model.path,
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        training=config.training,
        needs_reference=needs_reference(config.method),
        ranks=ranks,
        weights=None if checkpoint is None else load_file(checkpoint / "weights.safetensors"),
    )
    if checkpoint is not None:
        model.install_optimizer(*read_rank_shard(checkpoint, ranks, model.device))
    return Trainer(config, model, ranks)


def _split_evenly(num_groups: int, num_parts: int) -> Iterable[range]:
    # Rounded bounds of equal parts: sizes differ by one at most, and every group is in one part.
    bounds = [round(index * num_groups / num_parts) for index in range(num_parts + 1)]
    return [range(start, end) for start, end in itertools.pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class _BatchLoss:
    """The loss of one optimizer step.

    Attributes:
        ref_logprobs, proximal_logprobs: by a micro-batch's place in the step.
    """

    compute: Callable[..., tuple[Tensor, Metrics]]
    ref_logprobs: list[Tensor] | None
    proximal_logprobs: list[Tensor] | None
    totals: _Totals

    def compute_share(
        self, place: int, micro_batch: MicroBatch, policy_logprobs: Tensor, entropy: Tensor
    ) -> Tensor:
        loss, sums = self.compute(
            micro_batch,
            policy_logprobs=policy_logprobs,
            entropy=entropy,
            ref_logprobs=_pick(self.ref_logprobs, place),
            proximal_logprobs=_pick(self.proximal_logprobs, place),
        )
        self.totals.add(loss, sums)
        return loss


def _pick(values: Sequence[Tensor] | None, place: int) -> Tensor | None:
    return None if values is None else values[place]


class _Totals:
    """Sums of measurements over micro-batches, kept on the device until all steps are queued."""

    def __init__(self) -> None:
        self._sums: Metrics = {}
        self.gradient_norms: list[float] = []

    def add(self, loss: Tensor, sums: Metrics) -> None:
        """Count one micro-batch in."""
        self._add(sums | {"loss": loss.detach()})

    def merge(self, step: _Totals, gradient_norm: float) -> None:
        """Count in an optimizer step that was taken."""
        self._add(step._sums)
        self.gradient_norms.append(gradient_norm)

    def _add(self, sums: Metrics) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reduce(self, ranks: Ranks) -> dict[str, float]:
        """Means over the batch's tokens on all ranks. Empty if nothing was trained."""
        if not self._sums:
            return {}
        # In one order on every rank, since only the numbers are added up.
        names = sorted(self._sums)
        values = [self._sums[name].detach().double() for name in names]
        totals = ranks.sum(torch.stack(values).cpu())
        sums = dict(zip(names, totals.tolist(), strict=True))
        num_steps = len(self.gradient_norms)
        loss = sums.pop("loss") / num_steps
        return {
            **reduce_metrics(sums),
            "loss": loss,
            "gradient_norm": sum(self.gradient_norms) / num_steps,
        }
