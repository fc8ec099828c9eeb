"""Owns how a service gets at what its run shares: the bus and the weight store, built from configuration and settings."""

from __future__ import annotations

from sdar.config import RunConfig
from sdar.runtime.bus import BusLimits
from sdar.runtime.redis_bus import RedisBus
from sdar.runtime.settings import Settings
from sdar.runtime.weights import WeightStore

_LEAST_ENTRIES = 10_000


def build_bus(config: RunConfig, settings: Settings) -> RedisBus:
    """The run's bus, bounded so that everything admission allows fits twice, with what waits for a checkpoint."""
    training = config.training
    num_batches = training.max_staleness + 1 + training.checkpoint_every
    num_entries = 2 * num_batches * training.groups_per_update * training.group_size
    limits = BusLimits(max_entries=max(_LEAST_ENTRIES, num_entries))
    return RedisBus(settings.redis_url, config.name, config.stream_consumers, limits)


def build_weight_store(config: RunConfig, settings: Settings) -> WeightStore:
    """The run's weight store."""
    return WeightStore(settings.weights_url, config.name)
