"""What retrieval kind ucb has learned: which skills each group got, and how its episodes ended.

All of it is one stream of events, `skill_events`, that every teacher reads from its beginning. The
state follows from the newest of them alone, so teachers agree and a restart forgets nothing. Older
ones are forgotten, for they are about a policy of long ago.

- A choice is made by publishing it. Of two teachers that choose for the same group, the one that
  Redis put first is right.
- An outcome is published in the transaction that publishes the score and acknowledges the episode,
  hence never lost. One that comes twice (a transaction repeated, an episode scored by two teachers)
  is known by its trajectory id and counts once.
- A crash between choice and outcome leaves the choice, and the episode's next scorer finds it.

It never reads a trajectory and never sees a skill's text.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from sdar.bus.protocol import BEFORE_FIRST, Bus
from sdar.contracts import codec
from sdar.contracts.errors import ContractError, CorruptionError
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, Stream
from sdar.contracts.types import SkillChoice, SkillOutcome

log = structlog.get_logger()

_PAGE = 1000


@dataclass(slots=True)
class _Tally:
    """One skill with tasks of one type."""

    num_groups: int = 0
    num_outcomes: int = 0
    num_successes: int = 0


class SkillUtility:
    """Chooses skills by their upper confidence bound, and remembers.

    For a task of type t, with N groups of that type so far of which n were given skill i::

        score_i = successes_i / outcomes_i + exploration * sqrt(ln N / n)  never given: first of all

    Utility is the success of an episode, 0 or 1: returns of different environments and penalties
    need no scale then. Groups are counted when they choose, episodes when they end, so a skill
    whose outcomes are still awaited is not chosen by everybody at once; until the first of them its
    mean is 0.

    Args:
        exploration: weight of the second term.
        max_events: newest events that count; what the stream keeps.
    """

    def __init__(
        self,
        bus: Bus,
        exploration: float,
        max_events: int = BROADCAST_MAX_ENTRIES[Stream.SKILL_EVENTS],
    ) -> None:
        self._bus = bus
        self._exploration = exploration
        self._max_events = max_events
        self._cursor = BEFORE_FIRST
        self._turnstile = asyncio.Lock()
        self._events: deque[SkillChoice | SkillOutcome] = deque()
        self._choices: dict[str, SkillChoice] = {}
        self._outcomes: set[str] = set()
        self._num_groups: Counter[str] = Counter()
        self._tallies: dict[tuple[str, str], _Tally] = {}

    async def choose(self, key: str, task_type: str, skill_ids: Sequence[str], count: int) -> None:
        """Make sure that `key` has its choice.

        It is the one that was published first. Without any, the `count` best of `skill_ids` are
        proposed, ties in their order.

        Raises:
            BusUnavailableError: the choice cannot be shared, so none is made.
        """
        async with self._turnstile:
            await self._follow()
            # Published, then read back: another teacher's proposal may come before this one, and
            # whichever is first in the stream stands. More than one turn is needed only where this
            # one has been forgotten again.
            while key not in self._choices:
                best = sorted(
                    skill_ids, key=lambda skill_id: -self.compute_score(task_type, skill_id)
                )[:count]
                proposal = SkillChoice(key, task_type, tuple(best))
                await self._bus.publish(Stream.SKILL_EVENTS, [codec.encode_skill_event(proposal)])
                await self._follow()

    def get_choice(self, key: str) -> tuple[str, ...]:
        """Skill ids chosen for a key that `choose` has been called for."""
        return self._choices[key].skill_ids

    def compute_score(self, task_type: str, skill_id: str) -> float:
        tally = self._tallies.get((task_type, skill_id), _Tally())
        if not tally.num_groups:
            return math.inf
        mean = tally.num_successes / max(tally.num_outcomes, 1)
        # The bonus shrinks as the skill is given more often than others of its type.
        return mean + self._exploration * math.sqrt(
            math.log(self._num_groups[task_type]) / tally.num_groups
        )

    async def _follow(self) -> None:
        while entries := await self._bus.tail(Stream.SKILL_EVENTS, self._cursor, _PAGE):
            for entry in entries:
                self._cursor = entry.entry_id
                try:
                    self._remember(codec.decode_skill_event(entry.payload))
                except (ContractError, CorruptionError) as error:
                    # Other teachers skip it as well; stopping here would stop every one of them for
                    # good.
                    log.error("skill_event_unreadable", entry_id=entry.entry_id, error=str(error))

    def _remember(self, event: SkillChoice | SkillOutcome) -> None:
        if isinstance(event, SkillChoice):
            if event.key in self._choices:
                return
            self._choices[event.key] = event
        elif event.trajectory_id in self._outcomes:
            return
        else:
            self._outcomes.add(event.trajectory_id)
        self._events.append(event)
        self._count(event, 1)
        if len(self._events) > self._max_events:
            self._forget(self._events.popleft())

    def _forget(self, event: SkillChoice | SkillOutcome) -> None:
        self._count(event, -1)
        if isinstance(event, SkillChoice):
            del self._choices[event.key]
        else:
            self._outcomes.remove(event.trajectory_id)

    def _count(self, event: SkillChoice | SkillOutcome, sign: int) -> None:
        # Of a forgotten event with sign -1, so that the tallies are those of the events kept.
        tallies = [
            self._tallies.setdefault((event.task_type, skill_id), _Tally())
            for skill_id in event.skill_ids
        ]
        if isinstance(event, SkillChoice):
            self._num_groups[event.task_type] += sign
        for tally in tallies:
            if isinstance(event, SkillChoice):
                tally.num_groups += sign
            else:
                tally.num_outcomes += sign
                tally.num_successes += sign * event.is_success
