"""Counts the GPUs that torch finds."""

from __future__ import annotations


def count_gpus(wanted: int) -> int:
    """`wanted` where there are GPUs, 0 on a CPU. Touches none: what is forked later may still use
    them.
    """
    import torch

    return wanted if torch.cuda.device_count() else 0
