"""Manifests of policy versions: their JSON, sealed by a checksum, and the paths they may name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

from sdar.contracts.codec import weights_manifest_to_proto
from sdar.contracts.errors import ContractError, CorruptionError
from sdar.contracts.types import ModelIdentity, TensorEntry, WeightsManifest
from sdar.weights.objects import PATH_SEGMENT

MANIFEST = "manifest.json"
VERSION_PATH = re.compile(rf"{PATH_SEGMENT}/v(\d{{8,}})")
SHARD_NAME = re.compile(r"shard-\d{5,}-([0-9a-f]{64})\.safetensors")
REMEDY = "Fetch it again; if it stays, publish a new version."

_NO_MANIFEST = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    ContractError,
)
"""What decoding raises for JSON that is no manifest: it may nest too deep or hold any type."""


def manifest_to_json(manifest: WeightsManifest) -> str:
    """Readable JSON, one line a field. Without the probe: a learner that publishes the same weights
    again after a crash may measure it differently in the last bit.
    """
    fields = dataclasses.asdict(manifest)
    del fields["probe"]
    return json.dumps(fields, indent=1)


def manifest_from_json(text: str) -> WeightsManifest:
    """Inverse of `manifest_to_json`.

    Raises:
        CorruptionError: not a manifest.
    """
    try:
        manifest = _build_manifest(json.loads(text))
        # What cannot be announced is no manifest either: JSON puts any type into any field.
        weights_manifest_to_proto(manifest)
        check_manifest(manifest)
        return manifest
    except _NO_MANIFEST as error:
        raise CorruptionError(
            f"A weights manifest of {len(text)} characters cannot be decoded: {error}. {REMEDY}"
        ) from error


def _build_manifest(fields: dict[str, Any]) -> WeightsManifest:
    """A manifest from its JSON object, whatever that holds; raises any of `_NO_MANIFEST`."""
    tensors = tuple(
        TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in fields.pop("tensors")
    )
    model = ModelIdentity(**fields.pop("model"))
    return WeightsManifest(**{**fields, "tensors": tensors, "model": model})


def seal_manifest(json_object: str) -> bytes:
    """A JSON object with the SHA-256 of all that comes before it as its last field."""
    body = json_object.removesuffix("\n}").encode()
    return body + f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def unseal_manifest(content: bytes, path: str) -> str:
    """Undo `seal_manifest`. Raises CorruptionError if a byte is not as it was written."""
    # The last field is cut off and the rest is sealed again: equal only if all of it is untouched.
    json_object = content.rpartition(b',\n "sha256": "')[0] + b"\n}"
    text = json_object.decode(errors="replace")
    if seal_manifest(text) != content:
        raise CorruptionError(
            f"{path}, {len(content)} bytes, does not match the checksum at its end. {REMEDY}"
        )
    return text


def check_manifest(manifest: WeightsManifest) -> None:
    """Raises CorruptionError where a manifest leads out of its version's directory, or to itself.

    It may have come over the wire.
    """
    if wrong := _list_wrong_paths(manifest):
        raise CorruptionError(
            f"Weights manifest of version {manifest.policy_version} names {wrong[0]!r}, which is "
            "no path this store makes. Use manifests as `publish` returns them."
        )
    base_version = manifest.base_version
    # A base that is not older could make a circle of bases, which no reader would get out of.
    if base_version is not None and not 0 <= base_version < manifest.policy_version:
        raise CorruptionError(
            f"Weights manifest of version {manifest.policy_version} has base version "
            f"{base_version}; a base is older. Use manifests as `publish` returns them."
        )


def _list_wrong_paths(manifest: WeightsManifest) -> list[str]:
    path = format_version_path(manifest.run_id, manifest.policy_version)
    # The pattern as well: the run's name is the manifest's own, and could hold "..".
    is_right = VERSION_PATH.fullmatch(manifest.path) and manifest.path == path
    wrong = [] if is_right else [manifest.path]
    wrong += [entry.shard for entry in manifest.tensors if not SHARD_NAME.fullmatch(entry.shard)]
    return wrong


def describe_content(manifest: WeightsManifest) -> tuple[object, ...]:
    """What makes two publications of a version the same, however each was encoded."""
    return (
        list_layout(manifest),
        [entry.sha256 for entry in manifest.tensors],
        manifest.model,
        manifest.num_updates,
    )


def list_layout(manifest: WeightsManifest) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(entry.name, entry.dtype, entry.shape) for entry in manifest.tensors]


def locate(manifest: WeightsManifest, entry: TensorEntry) -> str:
    return f"Tensor {entry.name} of version {manifest.policy_version} ({manifest.path})"


def format_version_path(run_id: str, policy_version: int) -> str:
    return f"{run_id}/v{policy_version:08d}"
