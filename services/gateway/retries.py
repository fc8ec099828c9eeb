"""Dead letters whose work is done again: what can be made of one, and who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import structlog

from sdar.bus.protocol import Bus, DeadLetter
from sdar.contracts import codec
from sdar.contracts.errors import RefusedError, SdarError, UnknownResourceError
from sdar.contracts.streams import Stream
from sdar.contracts.types import Purpose, Task

from .admission import Admission
from .commit import Draft
from .evaluator import Evaluator
from .state import RunPhase

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Retry:
    """What a dead letter was about.

    Attributes:
        payload: for an evaluation's, the encoded task group to publish again as it is; else empty.
        issued: the id of the group that was issued for it.
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
    """What a letter was about. Raises RefusedError if nothing can be issued again for it."""
    if letter.stream in (Stream.LEDGER, Stream.EVALUATIONS):
        raise RefusedError(
            f"Dead letter {letter.letter_id} is a report on {letter.stream}, no work that could be "
            "done again.",
            letter_id=letter.letter_id,
        )
    retry = _decode(letter)
    if letter.stream is not Stream.TASKS and retry.purpose is not Purpose.TRAIN:
        raise RefusedError(
            f"Dead letter {letter.letter_id} holds an evaluation episode on {letter.stream}, where "
            "none belongs.",
            letter_id=letter.letter_id,
        )
    return retry


def _decode(letter: DeadLetter) -> Retry:
    try:
        return _decode_work(letter)
    except SdarError as error:
        raise RefusedError(
            f"Dead letter {letter.letter_id} of {letter.stream} cannot be read, so nobody knows "
            f"what to do again: {error}",
            letter_id=letter.letter_id,
        ) from error


def _decode_work(letter: DeadLetter) -> Retry:
    if letter.stream is Stream.TASKS:
        group = codec.decode_task_group(letter.payload)
        return Retry(letter.letter_id, group.group_id, group.task, group.purpose, letter.payload)
    if letter.stream is Stream.SCORED:
        trajectory = codec.decode_scored_trajectory(letter.payload).trajectory
    else:
        trajectory = codec.decode_trajectory(letter.payload)
    return Retry(letter.letter_id, trajectory.group_id, trajectory.task, trajectory.purpose, b"")


class Retries:
    """Retries that were asked for and are not committed yet."""

    def __init__(self, bus: Bus, run_id: str, admission: Admission, evaluator: Evaluator) -> None:
        self._bus = bus
        self._run_id = run_id
        self._admission = admission
        self._evaluator = evaluator
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
            # Somebody else may have asked for the same while this one waited for the letter.
            retry = self._waiting.setdefault(letter_id, read_letter(letter))
        # Shielded: others may wait for the same, and the draft may already hold it.
        return await asyncio.shield(retry.issued)

    def issue_waiting(self, draft: Draft) -> None:
        """Send the work of each letter out once more in the draft, which removes the letter."""
        for retry in list(self._waiting.values()):
            # Issued before, in this draft whose commit still waits for room.
            if retry.letter_id in draft.retried:
                continue
            try:
                self._issue(draft, retry)
            except RefusedError as error:
                self._waiting.pop(retry.letter_id).issued.set_exception(error)

    def settle(self, retried: Mapping[str, str]) -> None:
        """These are committed: letter id to the id of the group that was issued."""
        for letter_id, group_id in retried.items():
            self._waiting.pop(letter_id).issued.set_result(group_id)

    async def forget_gone(self, letter_ids: Collection[str]) -> None:
        """The commit of these was refused: drop those whose letter is gone, the others wait on."""
        for letter_id in letter_ids:
            if await self._bus.find_dead_letter(letter_id) is None:
                self._waiting.pop(letter_id).issued.set_exception(_gone(letter_id))

    def _issue(self, draft: Draft, retry: Retry) -> None:
        """A training task as a new group, an evaluation's task as it was."""
        phase = draft.state.phase
        if phase not in (RunPhase.RUNNING, RunPhase.PAUSED):
            raise RefusedError(f"Run {self._run_id} is {phase}; it issues nothing.")
        if retry.purpose is Purpose.TRAIN:
            group_id = self._admission.issue(draft, retry.task)
        else:
            group_id = retry.group_id
            self._evaluator.play_again(draft, group_id, retry.payload)
        draft.retried[retry.letter_id] = group_id
        log.info(
            "dead_letter_retried",
            letter_id=retry.letter_id,
            of_group=retry.group_id,
            group_id=group_id,
        )


def _gone(letter_id: str) -> UnknownResourceError:
    return UnknownResourceError(
        f"There is no dead letter {letter_id}: it was retried, or never was.", letter_id=letter_id
    )
