"""Owns the count of GPU-seconds: for how long a process holds how many GPUs, busy or not. Never
measures how busy they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector


class GpuTime(Collector):
    """Seconds since it was made times the GPUs held, worked out when it is asked.

    Args:
        num_gpus: 0 on a CPU, and the metric stays 0.
        clock: seconds, monotonic.
    """

    def __init__(self, num_gpus: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_gpus, self._clock, self._began_s = num_gpus, clock, clock()

    def collect(self) -> Iterator[CounterMetricFamily]:
        text = (
            "Seconds times the GPUs that the process holds, whether they work or not; 0 on a CPU."
        )
        yield CounterMetricFamily(
            "sdar_gpu_seconds", text, value=self._num_gpus * (self._clock() - self._began_s)
        )
