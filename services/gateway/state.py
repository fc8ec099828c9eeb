"""Owns the gateway's durable memory: one small JSON record, saved in the same transaction as what it decided."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum

from sdar.contracts.errors import CorruptionError
from sdar.contracts.types import GroupOutcome

from .evaluation import Evaluation
from .ledger import Ledger

STATE_NAME = "gateway"


class RunPhase(StrEnum):
    """STARTING waits for the first policy and the environment; STOPPING issues no more groups and evaluates once more;
    FAILED gave up, since group after group failed."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass
class GatewayState:
    """Everything a restarted gateway must know."""

    phase: RunPhase = RunPhase.STARTING
    next_group_number: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    evaluations: list[Evaluation] = field(default_factory=list)
    environments: dict[str, str] = field(default_factory=dict)
    started_at_s: float = 0.0
    finished_at_s: float = 0.0

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> GatewayState:
        """Raises CorruptionError if the record can't be read."""
        try:
            raw = json.loads(payload)
            ledger = raw.pop("ledger")
            ledger["closed"] = {GroupOutcome(name): number for name, number in ledger["closed"].items()}
            evaluations = [Evaluation(**evaluation) for evaluation in raw.pop("evaluations")]
            phase = RunPhase(raw.pop("phase"))
            return cls(phase=phase, ledger=Ledger(**ledger), evaluations=evaluations, **raw)
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptionError(
                f"The gateway's saved state can't be read ({error}). It was written by another version of sdar; "
                "start the run under a new name."
            ) from error
