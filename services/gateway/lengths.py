"""How long episodes were played, compared to how long those were that got trained.

A system that is short of time throws long episodes away first, and trains on another distribution
than it plays. In memory; decides nothing.
"""

from __future__ import annotations

from collections import Counter, deque

from sdar.contracts.types import GroupOutcome, LedgerEvent

KEPT_GROUPS = 256
"""Newest closed groups that are compared: many updates' worth, so that one update's luck is no
drift.
"""
LEAST_GROUPS = 32
"""Below this many the comparison says nothing yet."""


class EpisodeLengths:
    """Turns of each episode of the newest closed groups.

    A group enters when it is closed after it was played; one that is SKIPPED for want of a training
    signal stays out, since a signal may well go with length. A restarted gateway begins anew.
    """

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, ...]] = {}
        self._closed: deque[tuple[tuple[int, ...], bool]] = deque(maxlen=KEPT_GROUPS)

    def apply(self, event: LedgerEvent) -> None:
        """Take in one entry of the ledger's journal."""
        if event.outcome is GroupOutcome.GENERATED:
            self._open[event.group_id] = event.episode_turns
            return
        # Without turns it was closed before it was played, or played before this process began.
        turns = self._open.pop(event.group_id, ())
        if turns and event.outcome is not GroupOutcome.SKIPPED:
            self._closed.append((turns, event.outcome is GroupOutcome.TRAINED))

    def compute_drift(self) -> float:
        """`compute_length_drift` of all kept groups and the trained among them.

        0 while too few are kept, or none of them was trained.
        """
        played: Counter[int] = Counter()
        trained: Counter[int] = Counter()
        for turns, is_trained in self._closed:
            played.update(turns)
            if is_trained:
                trained.update(turns)
        if not trained or len(self._closed) < LEAST_GROUPS:
            return 0.0
        return compute_length_drift(played, trained)


def compute_length_drift(played: Counter[int], trained: Counter[int]) -> float:
    """Total variation distance between two distributions of episode length, given as counts:

        1/2 * sum over n of |share of n turns among the played - share of n turns among the trained|

    With `trained` a part of `played` it is 0 where nothing was dropped, and never over the share
    of episodes that were.
    """
    num_played = played.total()
    num_trained = trained.total()
    lengths = played.keys() | trained.keys()
    return sum(abs(played[n] / num_played - trained[n] / num_trained) for n in lengths) / 2
