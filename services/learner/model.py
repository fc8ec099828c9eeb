"""The policy on one rank: its DeepSpeed engine, the frozen reference, and one optimizer step.

Gradients are exact whatever the sharding: a loss share is a sum over tokens divided by the batch's
token count, DeepSpeed averages over ranks, so shares are multiplied by the number of ranks before
the backward pass and nothing else scales them. It never reads the bus and never decides what to
train on.

Axes: N sampled tokens of a micro-batch.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.batching import MicroBatch
from sdar.algorithms.logprobs import TokenScorer
from sdar.algorithms.scorer_check import require_exact_scorer
from sdar.config import TrainingConfig
from sdar.contracts.errors import ConfigurationError, CorruptionError
from sdar.model.causal_lm import install_tensors, load_causal_lm
from sdar.model.checkpoint_names import model_tensors, to_checkpoint
from services.learner.ranks import Ranks

LossShare = Callable[[int, MicroBatch, Tensor, Tensor], Tensor]
"""(place, micro-batch, policy_logprobs, entropy) to this micro-batch's share of the batch's loss.
"""

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two, by torch's names."""


class PolicyModel:
    """The policy being trained. All methods are collective: every rank calls them in the same
    order.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: str,
        temperature: float,
        training: TrainingConfig,
        needs_reference: bool,
        ranks: Ranks,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Args:
        weights: a checkpoint's, put in place of those in `model_path`; the reference always is
            `model_path`.

        Raises:
            ConfigurationError: no model there, or `TokenScorer` does not score it exactly.
        """
        self._ranks = ranks
        self._training = training
        self._is_sharded = training.zero_stage == 3
        causal_lm = load_causal_lm(model_path, dtype)
        # Before the engine is built, which copies its master weights from them.
        if weights is not None:
            install_tensors(causal_lm, weights.items())
        self._causal_lm = _prepare_for_training(causal_lm, training)
        self.vocabulary_size = int(causal_lm.get_input_embeddings().weight.shape[0])
        scorer = TokenScorer(
            causal_lm, temperature=temperature, chunk_size=training.logprob_chunk_tokens
        ).to(ranks.device)
        # Every rank for itself and before the engine, which may shard the weights.
        require_exact_scorer(causal_lm)
        self._engine = _build_engine(scorer, dtype, training)
        self._reference = (
            self._build_reference(model_path, dtype, temperature) if needs_reference else None
        )

    @property
    def device(self) -> torch.device:
        return self._ranks.device

    def compute_ref_logprobs(
        self, micro_batches: Sequence[MicroBatch]
    ) -> list[Float[Tensor, " N"]] | None:
        """Log-probs under the frozen reference, one tensor for each micro-batch.

        None if the method has no reference.
        """
        if self._reference is None:
            return None
        with self._on_device(self._reference) as reference, torch.no_grad():
            return [reference(m.input_ids, m.response_mask)[0] for m in micro_batches]

    def compute_policy_logprobs(
        self, micro_batches: Sequence[MicroBatch]
    ) -> list[Float[Tensor, " N"]]:
        """Log-probs under the policy as it is now, without gradient.

        They are the proximal ones of later minibatches.
        """
        with torch.no_grad():
            return [
                self._engine(m.input_ids, m.response_mask, self._num_rank_tokens(m))[0]
                for m in micro_batches
            ]

    def train_step(
        self, micro_batches: Sequence[MicroBatch], compute_share: LossShare, learning_rate: float
    ) -> float:
        """One optimizer step over all micro-batches of all ranks, or none.

        The step is skipped on every rank if the loss of any of their micro-batches, or the global
        gradient norm, is no finite number: weights and AdamW's moments stay as they were.

        Args:
            micro_batches: this rank's, of which every rank passes the same number, at least one.

        Returns:
            the global gradient norm before clipping; NaN if the step was skipped.
        """
        # DeepSpeed would take it from a scheduler, and that would be state to save.
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        for place, micro_batch in enumerate(micro_batches):
            # DeepSpeed steps, and where it can sums gradients over ranks, only at the boundary.
            self._engine.set_gradient_accumulation_boundary(place == len(micro_batches) - 1)
            logprobs, entropy = self._engine(
                micro_batch.input_ids, micro_batch.response_mask, self._num_rank_tokens(micro_batch)
            )
            share = compute_share(place, micro_batch, logprobs, entropy)
            # DeepSpeed averages over ranks, and the shares are to be added up.
            self._engine.backward(_spread_fault(share) * self._ranks.world_size)
        return self._step()

    def _step(self) -> float:
        """Step if the global gradient norm is finite; returns it, or NaN.

        The norm is of the gradients of all ranks, so that all of them decide alike.
        """
        if self._is_plain:
            return self._step_plain()
        self._engine.step()
        # ZeRO itself skips such a step, and keeps the norm of the step before in place of its own.
        is_skipped = self._engine.optimizer.overflow
        return math.nan if is_skipped else float(self._engine.get_global_grad_norm())

    def _step_plain(self) -> float:
        """At ZeRO stage 0 in float32 DeepSpeed neither reports the norm nor looks at it."""
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        # Before the step, which clears the gradients.
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self._engine.zero_grad()
            return math.nan
        self._engine.step()
        return norm

    def export(self) -> dict[str, Tensor]:
        """Full tensors of this policy version on the CPU, by the names of the checkpoint.

        Empty on ranks other than 0.
        """
        own = model_tensors(self._causal_lm)
        if self._is_sharded:
            own = self._gather(own)
        elif not self._ranks.is_leader:
            own = {}
        else:
            own = {name: value.detach().cpu().clone() for name, value in own.items()}
        # Of whole tensors on the CPU: joined or split on a GPU they would need its memory.
        return to_checkpoint(self._causal_lm, own)

    def _gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same from ZeRO-3's shards: every rank takes part, rank 0 gets the whole tensors."""
        import deepspeed

        # With tied ones under each of their names, as the export has them.
        parameters = dict(self._causal_lm.named_parameters(remove_duplicate=False))
        full: dict[str, Tensor] = {}
        for name, value in tensors.items():
            # One at a time: the whole model need not fit beside its shards.
            with deepspeed.zero.GatheredParameters(
                [parameters[name]] if name in parameters else []
            ):
                if self._ranks.is_leader:
                    full[name] = parameters.get(name, value).detach().cpu().clone()
        return full

    def export_optimizer(self) -> tuple[dict[str, Tensor], int]:
        """This rank's shard of master weights and AdamW moments, on the CPU, and the step count."""
        tensors, num_steps = {}, 0
        for index, master in enumerate(self._master_tensors()):
            tensors[f"{index}.master"] = master.detach().cpu().clone()
            state = self._engine.basic_optimizer.state.get(master, {})
            for name in _MOMENTS:
                if name in state:
                    tensors[f"{index}.{name}"] = state[name].detach().cpu().clone()
                    num_steps = int(state["step"])
        return tensors, num_steps

    def install_optimizer(self, tensors: dict[str, Tensor], num_steps: int) -> None:
        """Undo `export_optimizer`, in a model built with the same weights, ranks and ZeRO stage.

        Raises:
            CorruptionError: the shard is not of this model's shape.
        """
        for index, master in enumerate(self._master_tensors()):
            saved = tensors.get(f"{index}.master")
            if saved is None or saved.shape != master.shape:
                shape = None if saved is None else tuple(saved.shape)
                raise CorruptionError(
                    f"Optimizer shard of rank {self._ranks.rank} does not fit: part {index} has "
                    f"shape {shape}, expected {tuple(master.shape)}. Use the same model."
                )
            with torch.no_grad():
                master.copy_(saved)
            # Before its first step AdamW has no moments.
            if num_steps:
                moments = {name: tensors[f"{index}.{name}"] for name in _MOMENTS}
                self._install_moments(master, moments, num_steps)

    def _install_moments(self, master: Tensor, moments: dict[str, Tensor], num_steps: int) -> None:
        # Where torch's AdamW keeps it: beside the parameter only in its fused form.
        step_device = master.device if self._is_fused else "cpu"
        self._engine.basic_optimizer.state[master] = {
            "step": torch.tensor(float(num_steps), device=step_device),
            **{name: moment.to(master.device) for name, moment in moments.items()},
        }

    def close(self) -> None:
        """Take DeepSpeed's hooks off and release the engine."""
        self._engine.destroy()

    @property
    def _is_fused(self) -> bool:
        return bool(self._engine.basic_optimizer.defaults.get("fused"))

    def _num_rank_tokens(self, micro_batch: MicroBatch) -> int | None:
        # Only gathered weights make every call to the head a collective; else each rank makes as
        # many as it needs.
        return micro_batch.max_rank_tokens if self._is_sharded else None

    @property
    def _is_plain(self) -> bool:
        return not (self._engine.zero_optimization() or self._engine.bfloat16_enabled())

    def _master_tensors(self) -> list[Tensor]:
        if self._is_sharded:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._engine.basic_optimizer.param_groups for p in group["params"]]

    def _build_reference(self, model_path: Path, dtype: str, temperature: float) -> TokenScorer:
        causal_lm = load_causal_lm(model_path, dtype).requires_grad_(False)
        reference = TokenScorer(
            causal_lm, temperature=temperature, chunk_size=self._training.logprob_chunk_tokens
        )
        return reference if self._training.offload_reference else reference.to(self.device)

    @contextlib.contextmanager
    def _on_device(self, reference: TokenScorer) -> Iterator[TokenScorer]:
        yield reference.to(self.device)
        if self._training.offload_reference:
            reference.to("cpu")


def _spread_fault(share: Tensor) -> Tensor:
    """The share, or NaN in value and in every gradient if it is no finite number.

    A loss may be infinite where its gradient is not. So the gradient norm alone decides on a step.
    """
    return share * torch.where(torch.isfinite(share.detach()), 1.0, math.nan)


def _prepare_for_training(causal_lm: Any, training: TrainingConfig) -> Any:
    """Training mode without chance: gradient checkpointing needs the mode, and log-probs must be
    those of the policy that sampled.
    """
    for module in causal_lm.modules():
        _remove_chance(module)
    if training.gradient_checkpointing:
        if not causal_lm.supports_gradient_checkpointing:
            raise ConfigurationError(
                f"{type(causal_lm).__name__} has no gradient checkpointing. Set "
                "training.gradient_checkpointing to false."
            )
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    return causal_lm.train()


def _remove_chance(module: torch.nn.Module) -> None:
    """Set a layer's dropout, and a router's noise, to 0.

    Most architectures have them as numbers of their own layers, not as torch's Dropout.
    """
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
    for name, value in vars(module).items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(module, name, 0.0)


def _build_engine(scorer: TokenScorer, dtype: str, training: TrainingConfig) -> Any:
    import deepspeed

    # DeepSpeed's start warns about its own deprecated calls and prints its memory use.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        engine, _, _, _ = deepspeed.initialize(
            model=scorer,
            model_parameters=[p for p in scorer.parameters() if p.requires_grad],
            config=_deepspeed_config(dtype, training, is_on_gpu=next(scorer.parameters()).is_cuda),
            dist_init_required=False,
        )
    return engine


def _deepspeed_config(dtype: str, training: TrainingConfig, *, is_on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. The learning rate is set before each step, so no scheduler has
    state of its own.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigurationError(f"model.dtype {dtype} cannot be trained. Use float32 or bfloat16.")
    is_bfloat16 = dtype == "bfloat16"
    # Stage 0 in bfloat16 would add up gradients in bfloat16; stage 1 does it in float32 and on one
    # rank is the same.
    stage = max(training.zero_stage, 1) if is_bfloat16 else training.zero_stage
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_gradient_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "torch_adam": True,
                "lr": training.learning_rate,
                "betas": list(training.adam_betas),
                "weight_decay": training.weight_decay,
                "fused": is_on_gpu,
            },
        },
        "bf16": {"enabled": is_bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage, "overlap_comm": is_on_gpu and stage >= 2},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
