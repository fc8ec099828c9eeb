import sys

from prometheus_client import CollectorRegistry

from sdar.model.gpus import count_gpus
from sdar.process.gpu_time import GpuTime


def test_gpu_seconds_are_seconds_times_the_gpus_that_are_held():
    now, registry = [100.0], CollectorRegistry()
    registry.register(GpuTime(4, clock=lambda: now[0]))
    now[0] = 110.0
    assert registry.get_sample_value("sdar_gpu_seconds_total") == 40
    now[0] = 111.0
    assert registry.get_sample_value("sdar_gpu_seconds_total") == 44


def test_a_cpu_costs_no_gpu_seconds_and_says_so(monkeypatch):
    class Torch:
        class cuda:
            device_count = staticmethod(lambda: 0)

    monkeypatch.setitem(sys.modules, "torch", Torch)
    registry = CollectorRegistry()
    registry.register(GpuTime(count_gpus(8)))
    assert registry.get_sample_value("sdar_gpu_seconds_total") == 0
    Torch.cuda.device_count = staticmethod(lambda: 8)
    assert count_gpus(2) == 2
