"""What keeps the policy near where it began: the k3 estimate of the KL to a frozen reference.

Axes: N sampled tokens.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sdar.algorithms.corrections import LOG_RATIO_BOUND
from sdar.algorithms.inputs import TokenInputs
from sdar.algorithms.terms import TERMS, Metrics
from sdar.contracts.errors import ContractError
from sdar.contracts.methods import LossSettings

K3_BOUND = 10.0
"""Largest k3 KL of one token."""


def compute_k3_kl(
    policy_logprobs: Float[Tensor, " N"], ref_logprobs: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """k3 = exp(x) - x - 1 with x = ref - policy, at most K3_BOUND.

    An estimate of the KL that is never negative (Schulman, 2020, "Approximating KL divergence").

    A clamped token has no gradient.
    """
    # Clamped before the exponential: an overflow that is clamped after it has a gradient of
    # 0 * inf = NaN.
    log_ratio = (ref_logprobs - policy_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (log_ratio.exp() - log_ratio - 1).clamp(max=K3_BOUND)


@TERMS.register("kl")
def kl(inputs: TokenInputs, settings: LossSettings) -> tuple[Float[Tensor, " N"], Metrics]:
    """The k3 KL to the reference. Raises ContractError where the reference did not score."""
    if inputs.ref_logprobs is None:
        raise ContractError(
            f"kl_coefficient is {settings.kl_coefficient} but no ref_logprobs were given. Score "
            "the batch with the reference."
        )
    k3_kl = compute_k3_kl(inputs.policy_logprobs, inputs.ref_logprobs)
    return k3_kl, {"k3_kl": k3_kl}
