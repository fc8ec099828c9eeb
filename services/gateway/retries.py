"""Owns dead letters that are tried again: what can be made of one, and who waits for it. It issues
nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from sdar.bus.protocol import Bus, DeadLetter
from sdar.contracts import codec
from sdar.contracts.errors import RefusedError, SdarError, UnknownResourceError
from sdar.contracts.streams import Stream
from sdar.contracts.types import Purpose, Task


@dataclass(frozen=True, slots=True)
class Retry:
    """What a dead letter was about. `payload` is the task group to publish again as it is, for an
    evaluation's.
    """

    letter_id: str
    group_id: str
    task: Task
    purpose: Purpose
    payload: bytes
    issued: asyncio.Future[str] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


def read_letter(letter: DeadLetter) -> Retry:
    """Raises RefusedError if nothing can be issued again for it."""
    if letter.stream in (Stream.LEDGER, Stream.EVALUATIONS):
        raise RefusedError(
            f"Dead letter {letter.letter_id} is a report on {letter.stream}, no work that could be "
            "done again.",
            letter_id=letter.letter_id,
        )
    try:
        if letter.stream is Stream.TASKS:
            group = codec.decode_task_group(letter.payload)
            return Retry(
                letter.letter_id, group.group_id, group.task, group.purpose, letter.payload
            )
        is_scored = letter.stream is Stream.SCORED
        trajectory = (
            codec.decode_scored_trajectory(letter.payload).trajectory
            if is_scored
            else codec.decode_trajectory(letter.payload)
        )
    except SdarError as error:
        raise RefusedError(
            f"Dead letter {letter.letter_id} of {letter.stream} cannot be read, so nobody knows "
            f"what to do again: {error}",
            letter_id=letter.letter_id,
        ) from error
    if trajectory.purpose is not Purpose.TRAIN:
        raise RefusedError(
            f"Dead letter {letter.letter_id} holds an evaluation episode on {letter.stream}, where "
            "none belongs.",
            letter_id=letter.letter_id,
        )
    return Retry(letter.letter_id, trajectory.group_id, trajectory.task, trajectory.purpose, b"")


class Retries:
    """Retries asked for and not yet committed. `taken` are those of the scheduler's turn in hand:
    letter to issued group.
    """

    def __init__(self, bus: Bus) -> None:
        self.taken: dict[str, str] = {}
        self._bus = bus
        self._waiting: dict[str, Retry] = {}

    async def ask(self, letter_id: str) -> str:
        """Wait until the letter's work is issued again; returns the id of the group that was.

        Asked twice at once it happens once. A caller who stops waiting doesn't call it off.

        Raises:
            UnknownResourceError: there is no such letter (any more). RefusedError: nothing can be
                issued for it.
        """
        retry = self._waiting.get(letter_id)
        if retry is None:
            letter = await self._bus.find_dead_letter(letter_id)
            if letter is None:
                raise _gone(letter_id)
            retry = self._waiting.setdefault(letter_id, read_letter(letter))
        return await asyncio.shield(retry.issued)

    def waiting(self) -> list[Retry]:
        return [retry for letter_id, retry in self._waiting.items() if letter_id not in self.taken]

    def refuse(self, retry: Retry, error: SdarError) -> None:
        self._waiting.pop(retry.letter_id).issued.set_exception(error)

    def settle(self) -> None:
        """What was taken is committed."""
        for letter_id, group_id in self.taken.items():
            self._waiting.pop(letter_id).issued.set_result(group_id)
        self.taken.clear()

    async def forget_gone(self) -> None:
        """The commit of what was taken was refused: drop those whose letter is gone, the others
        wait on.
        """
        for letter_id in self.taken:
            if await self._bus.find_dead_letter(letter_id) is None:
                self._waiting.pop(letter_id).issued.set_exception(_gone(letter_id))
        self.taken.clear()


def _gone(letter_id: str) -> UnknownResourceError:
    return UnknownResourceError(
        f"There is no dead letter {letter_id}: it was retried, or never was.", letter_id=letter_id
    )
