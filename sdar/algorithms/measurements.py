"""What a loss measures over tokens beside its value: each declared once, with its denominator.

A term returns a value for each token under one of these names; `reduce_metrics` turns the sums into
means. The learner shows each mean to Prometheus as `sdar_learner_<name>` and holds it in its metric
records, so that a new one is declared here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenMeasurement:
    """A mean over tokens. `denominator` is the count of TOKEN_COUNTS that its sum is divided by."""

    name: str
    unit: str
    help: str
    denominator: str = "num_tokens"


TOKEN_COUNTS = {
    "num_tokens": "Sampled tokens trained on.",
    "num_scored_tokens": "Those of them that the teacher scored.",
    "num_current_tokens": "Those of them that were sampled by the weights that are trained.",
}
"""Denominators, by name: counts stay as they are."""

TOKEN_MEASUREMENTS = (
    TokenMeasurement(
        "gate_mean",
        "0 to 1",
        "Gate over scored tokens; 0.5 with teacher_gap_abs at 0 means that the skills do not reach "
        "the teacher.",
        denominator="num_scored_tokens",
    ),
    TokenMeasurement(
        "gate_open_share",
        "0 to 1",
        "Share of scored tokens whose gate is over 0.5.",
        denominator="num_scored_tokens",
    ),
    TokenMeasurement(
        "teacher_gap_mean",
        "nats",
        "teacher_logprobs - policy_logprobs over scored tokens.",
        denominator="num_scored_tokens",
    ),
    TokenMeasurement(
        "teacher_gap_abs",
        "nats",
        "Absolute teacher gap over scored tokens.",
        denominator="num_scored_tokens",
    ),
    # Of these tokens any difference comes from the engines, and not from staleness.
    TokenMeasurement(
        "engine_mismatch_abs",
        "nats",
        "|policy_logprobs - behavior_logprobs| of tokens sampled by the weights that are trained.",
        denominator="num_current_tokens",
    ),
    TokenMeasurement(
        "policy_behavior_gap_abs", "nats", "The same over all tokens, older ones included."
    ),
    TokenMeasurement(
        "k3_kl",
        "nats",
        "KL to the reference policy, k3 estimator; only with method.kl_coefficient above 0.",
    ),
    TokenMeasurement("entropy", "nats", "Entropy of the policy over sampled tokens."),
    TokenMeasurement("clip_fraction", "0 to 1", "Share of tokens whose ratio is clipped."),
    TokenMeasurement(
        "dual_clip_fraction",
        "0 to 1",
        "Share of tokens with a negative advantage whose loss is at its bound, the dual clip.",
    ),
    TokenMeasurement("off_policy_weight_mean", "1", "Off-policy weight of the policy term."),
    TokenMeasurement(
        "distillation_weight_mean", "1", "Off-policy weight of the distillation term."
    ),
    TokenMeasurement(
        "off_policy_bounded_share",
        "0 to 1",
        "Share of tokens whose off-policy weight is cut at its bound.",
    ),
    TokenMeasurement("advantage_abs", "1", "Absolute advantage over tokens."),
)

DENOMINATORS = {measurement.name: measurement.denominator for measurement in TOKEN_MEASUREMENTS}
