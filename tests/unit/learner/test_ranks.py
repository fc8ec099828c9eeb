"""What a rank other than 0 does when a disk refuses a checkpoint; on invented ranks."""

from __future__ import annotations

import torch

from sdar.contracts.errors import CapacityError
from services.learner.update import Trainer
from tests.unit.learner.builders import make_config


class OtherDiskIsFull:
    """Rank 1 of 2: rank 0 says to save twice, then to stop; the first time its disk is full."""

    rank = 1
    world_size = 2
    is_leader = False

    def __init__(self, directory):
        self.commands = iter([{"do": "save", "directory": str(directory)}] * 2 + [{"do": "stop"}])
        self.refusals = iter([CapacityError("Writing failed on 1 of 2 ranks."), None])

    def broadcast_command(self, _):
        return next(self.commands), []

    def raise_together(self, error, what):
        assert error is None
        if (refusal := next(self.refusals)) is not None:
            raise refusal


class SmallModel:
    device = torch.device("cpu")
    is_closed = False

    def export(self):
        return {}

    def export_optimizer(self):
        return {"0.master": torch.zeros(2)}, 1

    def close(self):
        self.is_closed = True


def test_a_rank_outlives_a_checkpoint_that_another_ranks_disk_refused(tmp_path):
    model = SmallModel()
    Trainer(make_config(num_ranks=2), model, OtherDiskIsFull(tmp_path), probe=()).follow()
    assert model.is_closed
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer-00001-of-00002.safetensors"]
