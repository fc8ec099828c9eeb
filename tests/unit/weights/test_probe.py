"""By which an engine proves that it computes what the learner computes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from sdar.contracts import codec
from sdar.contracts.errors import ContractError, MismatchError
from sdar.contracts.types import ProbeSequence
from sdar.weights.manifests import manifest_from_json, manifest_to_json
from sdar.weights.probe import (
    NUM_SEQUENCES,
    SEQUENCE_TOKENS,
    TOLERANCE,
    check_mismatch,
    draw_probe,
    measure_mismatch,
)

from .test_follower import make_manifest

PROBE = (ProbeSequence((5, 6, 7), (-1.5, -2.25)), ProbeSequence((8, 9), (-0.5,)))
MANIFEST = dataclasses.replace(make_manifest(3), probe=PROBE)


def score(*differences: float) -> list[np.ndarray]:
    first, second, third = differences
    return [
        np.array([-1.5 + first, -2.25 + second], np.float32),
        np.array([-0.5 + third], np.float32),
    ]


def test_the_same_sequences_are_drawn_in_every_process() -> None:
    drawn = draw_probe(range(100, 200), 500)
    assert drawn == draw_probe(range(100, 200), 500)
    assert [len(sequence) for sequence in drawn] == [SEQUENCE_TOKENS] * NUM_SEQUENCES
    assert set().union(*drawn) <= set(range(100, 200))
    assert {len(sequence) for sequence in draw_probe(range(9), 7)} == {7}


def test_a_mismatch_is_the_mean_and_the_largest_difference() -> None:
    mismatch = measure_mismatch(MANIFEST, score(0.25, -0.5, 0.0))
    assert (mismatch.mean, mismatch.largest) == (0.25, 0.5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("off_by", [1.5, -1.5, math.inf, math.nan])
def test_an_engine_that_is_off_is_refused_with_the_figures(dtype: str, off_by: float) -> None:
    mismatch = measure_mismatch(MANIFEST, score(off_by, 0.0, 0.0))
    with pytest.raises(MismatchError, match=r"version 3 .* 3 tokens of its probe"):
        check_mismatch(MANIFEST, mismatch, dtype)


@pytest.mark.parametrize(("dtype", "off_by"), [("float32", 1e-4), ("bfloat16", 0.15)])
def test_rounding_is_no_mismatch(dtype: str, off_by: float) -> None:
    check_mismatch(MANIFEST, measure_mismatch(MANIFEST, score(off_by, off_by, off_by)), dtype)


def test_a_probe_travels_with_what_is_announced_and_is_no_part_of_what_is_stored() -> None:
    assert codec.decode_weights_manifest(codec.encode_weights_manifest(MANIFEST)) == MANIFEST
    assert manifest_from_json(manifest_to_json(MANIFEST)).probe == ()


def test_a_probe_sequence_has_a_log_prob_for_every_token_but_the_first() -> None:
    with pytest.raises(ContractError, match="3 tokens with 3"):
        ProbeSequence((1, 2, 3), (-1.0, -1.0, -1.0))
