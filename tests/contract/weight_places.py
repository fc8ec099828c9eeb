"""Where the suites of the weight store keep weights, and what they publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import obstore
import torch
from obstore.store import LocalStore, S3Store
from torch import Tensor

from sdar.contracts.types import ModelIdentity
from sdar.weights.store import WeightStore

MODEL = ModelIdentity("tiny", "f00d")


@dataclass
class Place:
    """Where a store keeps its objects, with a back door for damage."""

    url: str
    objects: LocalStore | S3Store
    s3_options: dict[str, str | bool] = field(default_factory=dict)

    def open(self, run_id: str = "run", max_shard_bytes: int = 1 << 20) -> WeightStore:
        return WeightStore(self.url, run_id, max_shard_bytes, self.s3_options)

    def paths(self) -> list[str]:
        return sorted(item["path"] for batch in obstore.list(self.objects) for item in batch)

    def damage(self, path: str, change: Callable[[bytes], bytes]) -> None:
        obstore.put(self.objects, path, change(bytes(obstore.get(self.objects, path).bytes())))


@dataclass
class Gathered(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for, as a sharded learner gathers its own."""

    names: list[str]
    gather: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.gather(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def make_tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "embed.weight": torch.full((4, 3), value),
        "norm.weight": torch.full((3,), -value, dtype=torch.bfloat16),
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name], tensor), name
