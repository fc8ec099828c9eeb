"""Hostile bytes in streams, manifests, checkpoints and worker frames raise a typed error only.

Thousands of inputs each, from fixed seeds: random bytes, good payloads with bytes changed, and
messages with every field at its extremes. Single-byte corruption of weights and checkpoints as
wholes is proved elsewhere; here it is about the decoders.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdar.bus.ledger import parse_group_number
from sdar.contracts import codec
from sdar.contracts.errors import ContractError, CorruptionError
from sdar.environments.frames import FrameReader, pack_frame
from sdar.v1 import gateway_pb2, policy_pb2, task_pb2, teacher_pb2, trajectory_pb2
from sdar.weights.manifests import manifest_from_json, manifest_to_json
from services.learner.progress import Progress
from tests.fuzzing import Fuzzer, hostile_inputs, resident_bytes

GOLDEN = Path(__file__).parent / "golden"
NUM_INPUTS = 3000
MAX_GROWTH_BYTES = 128 << 20
"""What a process may keep after a test's inputs: allocator's slack, far less than the inputs."""

PAYLOADS = {
    "task_group": task_pb2.TaskGroup,
    "trajectory": trajectory_pb2.Trajectory,
    "scored_trajectory": trajectory_pb2.ScoredTrajectory,
    "weights_manifest": policy_pb2.WeightsManifest,
    "ledger_event": task_pb2.LedgerEvent,
    "metric_record": gateway_pb2.MetricRecord,
    "skill_event": teacher_pb2.SkillEvent,
}
DECODERS = sorted(
    name.removeprefix("decode_") for name in vars(codec) if name.startswith("decode_")
)


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


@pytest.fixture(autouse=True)
def bounded_memory():
    before = resident_bytes()
    yield
    assert resident_bytes() - before < MAX_GROWTH_BYTES


@pytest.mark.parametrize("name", DECODERS)
def test_a_stream_payload_is_decoded_or_refused_by_type_and_what_is_accepted_can_be_written_again(
    name: str,
) -> None:
    decode: Callable[[bytes], Any] = getattr(codec, f"decode_{name}")
    encode: Callable[[Any], bytes] = getattr(codec, f"encode_{name}")
    kind = PAYLOADS[name]
    good = kind.FromString((GOLDEN / f"{name}.bin").read_bytes())
    num_accepted = 0
    for data in hostile_inputs(Fuzzer(seed_of(name)), kind, NUM_INPUTS, lambda: good):
        try:
            value = decode(data)
        except (ContractError, CorruptionError):
            continue
        num_accepted += 1
        written = encode(value)
        assert encode(decode(written)) == written
    # Both ways are taken: neither is everything refused at the door, nor is anything believed.
    assert NUM_INPUTS * 0.02 < num_accepted < NUM_INPUTS


# ---- JSON: manifests of weights, progress in checkpoints


def make_json(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, with extremes that Python's parser lets through."""
    scalars = (
        None,
        True,
        0,
        -1,
        1,
        2**63,
        10**400,
        0.5,
        float("inf"),
        float("nan"),
        "",
        "v00000001",
        "é\0",
        [],
        {},
    )
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(scalars)
    values = [make_json(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return (
        values
        if rng.random() < 0.5
        else {rng.choice(("a", "shape", "path", "name")): value for value in values}
    )


def vary_json(rng: random.Random, value: Any) -> Any:
    """A good document with one place in it replaced, removed or doubled."""
    document = json.loads(json.dumps(value))
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return document
        key = rng.choice(keys)
        if not isinstance(place[key], dict | list) or rng.random() < 0.3:
            break
        place = place[key]
    match rng.randrange(4):
        case 0:
            del place[key]
        case 1 if isinstance(place, list):
            place.append(place[key])
        case 2 if isinstance(place, dict):
            place["surplus"] = place[key]
        case _:
            place[key] = make_json(rng)
    return document


def hostile_documents(name: str, good: Any) -> list[str]:
    rng, fuzzer = random.Random(seed_of(name)), Fuzzer(seed_of(name))
    text = json.dumps(good)
    deep = ["[" * 100_000, '{"a":' * 50_000, f'{{"tensors": {"[" * 100_000}']
    varied = [json.dumps(vary_json(rng, good)) for _ in range(NUM_INPUTS // 3)]
    mutated = [
        fuzzer.mutate(text.encode()).decode(errors="replace") for _ in range(NUM_INPUTS // 3)
    ]
    return deep + varied + mutated + [json.dumps(make_json(rng)) for _ in range(NUM_INPUTS // 3)]


def test_a_weights_manifest_is_read_or_refused_as_corrupt() -> None:
    manifest = codec.decode_weights_manifest((GOLDEN / "weights_manifest.bin").read_bytes())
    good = json.loads(manifest_to_json(manifest)) | {"path": "run/v00000012"}
    good["tensors"] = [
        entry | {"shard": f"shard-00000-{'0' * 64}.safetensors"} for entry in good["tensors"]
    ]
    manifest_from_json(json.dumps(good))
    for text in hostile_documents("weights manifest", good):
        try:
            accepted = manifest_from_json(text)
        except CorruptionError:
            continue
        try:
            codec.encode_weights_manifest(accepted)
        except ContractError:
            raise AssertionError(f"accepted what cannot be announced: {text[:500]}") from None


def test_progress_in_a_checkpoint_is_read_or_refused_as_corrupt() -> None:
    good = Progress().after_update(["group-00000000", "group-00000001"]).continue_after(3).to_json()
    for text in hostile_documents("progress", good):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        try:
            progress = Progress.from_json(value)
        except CorruptionError:
            continue
        json.dumps(progress.to_json())
        progress.compute_staleness(2)


# ---- frames between the environment server and its workers


def test_frames_are_objects_or_a_value_error_and_a_false_length_is_not_waited_for() -> None:
    fuzzer = Fuzzer(seed_of("frames"))
    good = b"".join(pack_frame({"id": index, "ok": {"text": "é" * index}}) for index in range(5))
    for index in range(NUM_INPUTS):
        data = fuzzer.mutate(good) if index % 3 else fuzzer.make_bytes()
        reader = FrameReader()
        cut = fuzzer.random.randint(0, len(data))
        try:
            frames = [*reader.feed(data[:cut]), *reader.feed(data[cut:])]
        except ValueError:
            continue
        assert all(isinstance(frame, dict) for frame in frames), data


def test_a_group_id_that_is_no_group_id_has_no_number() -> None:
    fuzzer = Fuzzer(seed_of("group id"))
    for _ in range(NUM_INPUTS):
        text = fuzzer.mutate(b"group-00000042").decode(errors="replace")
        number = parse_group_number(text)
        assert number is None or f"group-{number:08d}" == text


def test_every_payload_of_a_stream_is_covered_here() -> None:
    assert sorted(PAYLOADS) == DECODERS
