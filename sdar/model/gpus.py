"""Counts the GPUs that torch finds."""

from __future__ import annotations


def count_gpus(wanted: int) -> int:
    """`wanted` where there are GPUs, 0 on a CPU.

    Initialises none: a process that has done so could not fork children that use them.
    """
    import torch

    return wanted if torch.cuda.device_count() else 0
