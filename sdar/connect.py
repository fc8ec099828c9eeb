"""Builds what a run's services share: the bus, the weight store and the local model directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdar.bus.protocol import BusLimits
from sdar.bus.redis import RedisBus
from sdar.bus.redis_connection import OnBlocked
from sdar.config import RunConfig
from sdar.contracts.errors import ConfigurationError
from sdar.model.files import check_model_files
from sdar.process.settings import Settings

if TYPE_CHECKING:
    from sdar.weights.store import WeightStore

_LEAST_ENTRIES = 10_000


def locate_model(config: RunConfig, *, with_weights: bool = True) -> RunConfig:
    """The run with a model.path that is a complete local directory.

    A hub name is fetched into the hub's cache first.

    Args:
        with_weights: false where only the tokenizer is read: the gateway fetches no gigabytes.

    Raises:
        ConfigurationError: neither a model directory nor a hub name that can be fetched.
    """
    path = config.model.path
    if not path.is_dir():
        path = _fetch_from_hub(path, with_weights=with_weights)
    check_model_files(path, with_weights=with_weights)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def _fetch_from_hub(path: Path, *, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.jinja", "*.txt", *(["*.safetensors"] if with_weights else [])]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        raise ConfigurationError(
            f"model.path {path} is no directory here, and fetching it as a hub name failed: "
            f"{type(error).__name__}. Point it at a Hugging Face model directory, or make a tiny "
            "one with `sdar model create`."
        ) from error


def build_bus(
    config: RunConfig, settings: Settings, *, on_blocked: OnBlocked | None = None
) -> RedisBus:
    """The run's bus, with room for twice what admission allows and what waits for a checkpoint.

    `on_blocked` is called when Redis holds this service up (`Health.report_blocked`).
    """
    training = config.training
    # Batches within the staleness bound, the one that is being played, and those trained on since
    # the last checkpoint, whose entries are acknowledged with the next one.
    num_batches = training.max_staleness + 1 + training.checkpoint_every
    num_entries = 2 * num_batches * training.groups_per_update * training.group_size
    limits = BusLimits(max_entries=max(_LEAST_ENTRIES, num_entries))
    consumers = config.stream_consumers
    return RedisBus(
        settings.redis_url,
        config.name,
        consumers,
        limits,
        client_name=settings.instance,
        on_blocked=on_blocked,
    )


def build_weight_store(config: RunConfig, settings: Settings) -> WeightStore:
    """The run's weight store."""
    # Imported here because it imports torch, which the gateway and `sdar run` need not wait for.
    from sdar.weights.store import WeightStore

    return WeightStore(settings.weights_url, config.name)
