"""GPU-seconds: for how long a process holds how many GPUs, whether they work or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from sdar.process.measurements import Counter, Declarations

GPUS = Declarations()
"""What each service measures that holds GPUs."""
GPU_SECONDS = GPUS.declare(
    Counter(
        "sdar_gpu_seconds_total",
        "seconds",
        "Seconds times the GPUs that the process holds, whether they work or not; 0 on a CPU.",
    )
)


class GpuTime(Collector):
    """Seconds since it was made times the GPUs held, worked out when Prometheus asks.

    Args:
        num_gpus: 0 on a CPU, and the metric stays 0.
        clock: seconds, monotonic.
    """

    def __init__(self, num_gpus: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_gpus = num_gpus
        self._clock = clock
        self._began_s = clock()

    def collect(self) -> Iterator[CounterMetricFamily]:
        # Worked out at each scrape: a counter that a loop adds to would stand still while it hangs.
        held_s = self._clock() - self._began_s
        yield CounterMetricFamily(GPU_SECONDS.name, GPU_SECONDS.help, value=self._num_gpus * held_s)
