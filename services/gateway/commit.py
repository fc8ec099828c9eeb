"""The draft of the next commit: what it publishes, books, acknowledges and saves, and its writing.

A decision, the groups it issues in the account, the acknowledgement of the events it rests on and
the state it leads to are one commit: a gateway killed anywhere comes back to a consistent cursor,
and no group is issued twice or forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from sdar.bus.protocol import Bus, Delivery
from sdar.contracts import codec
from sdar.contracts.errors import RefusedError
from sdar.contracts.streams import Stream
from sdar.contracts.types import LedgerEvent, TaskGroup
from sdar.process import tracing

from .state import STATE_NAME, GatewayState

log = structlog.get_logger()

Request = Callable[[GatewayState], None]
"""A change of the state that somebody asks for. Raises RefusedError if the state does not allow it.
"""


@dataclass
class Draft:
    """What was decided since the last commit, and the state that it leads to.

    Attributes:
        state: changed in place by every decision.
        is_changed: whether `state` has to be saved even if nothing below asks for a commit.
        events: what the decisions rest on; acknowledged.
        tasks: encoded task groups, to be published.
        transitions: ISSUED, for each training group among the tasks.
        spans: one for each of these groups; they end when the groups are in Redis.
        retried: dead letters that are removed, since their work is among the tasks: letter id to
            the id of the group that does it.
    """

    state: GatewayState = field(default_factory=GatewayState)
    is_changed: bool = False
    events: list[Delivery] = field(default_factory=list)
    tasks: list[bytes] = field(default_factory=list)
    transitions: list[LedgerEvent] = field(default_factory=list)
    spans: list[tracing.Span] = field(default_factory=list)
    retried: dict[str, str] = field(default_factory=dict)

    def publish(self, group: TaskGroup) -> None:
        """Have a task group played."""
        self.tasks.append(codec.encode_task_group(group))

    @property
    def is_due(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.is_changed or self.tasks or self.events or self.retried)


class Committer:
    """Writes one draft after another, and keeps what was asked for until a commit holds it.

    Attributes:
        draft: the one in hand. Every commit and every load puts another in its place, so look it up
            again after either.
    """

    def __init__(self, bus: Bus) -> None:
        self.draft = Draft()
        self._bus = bus
        self._requests: list[Request] = []
        self._confirmations: list[asyncio.Future[None]] = []

    def ask(self, request: Request) -> None:
        """Change the state for somebody; done again if the commit that would save it is refused."""
        request(self.draft.state)
        self.draft.is_changed = True
        self._requests.append(request)

    async def load(self) -> None:
        """Begin a draft from the saved state, with what was asked for and is not saved yet."""
        saved = await self._bus.load_state(STATE_NAME)
        state = GatewayState() if saved is None else GatewayState.from_bytes(saved)
        if saved is not None:
            log.info("gateway_restored", num_issued=state.next_group_number, phase=state.phase)
        self.draft = Draft(state, is_changed=bool(self._confirmations))
        for request in self._requests:
            try:
                request(state)
            except RefusedError as error:
                log.warning("request_lost", error=error.message)
            else:
                self.draft.is_changed = True

    async def commit(self) -> Draft:
        """Write the draft in hand in one transaction and begin the next; returns what is written.

        Raises:
            CapacityError: the tasks that nobody plays yet leave no room; the draft stays in hand.
            LeaseLostError: an event was given away, or a letter is gone. Nothing of the draft
                happened, and it must be dropped: `load`.
        """
        draft = self.draft
        # Those that this commit holds; more may be asked for while it is being written.
        num_requests = len(self._requests)
        num_confirmations = len(self._confirmations)
        # Before it is written: a request may change the state again meanwhile.
        draft.is_changed = False
        await self._bus.commit(
            {Stream.TASKS: draft.tasks} if draft.tasks else {},
            draft.events,
            {STATE_NAME: draft.state.to_bytes()},
            transitions=draft.transitions,
            retired_letters=list(draft.retried),
        )
        for span in draft.spans:
            span.end()
        # Without waiting in between: what is decided into the old draft from now on would be lost.
        self.draft = Draft(draft.state, is_changed=draft.is_changed)
        del self._requests[:num_requests]
        self._confirm(num_confirmations)
        return draft

    async def confirm_tenure(self) -> None:
        """Return once the state as of now is written, so while no other gateway has the role.

        In a gateway that is superseded, or whose Redis is away, it never returns: give up waiting.
        """
        written = asyncio.get_running_loop().create_future()
        self._confirmations.append(written)
        self.draft.is_changed = True
        await written

    async def confirm_uncommitted(self) -> None:
        """Answer those who wait in `confirm_tenure` while the state is not to be written."""
        num_confirmations = len(self._confirmations)
        if num_confirmations:
            await self.check_tenure()
            self._confirm(num_confirmations)

    async def check_tenure(self) -> None:
        """Raises SupersededError if this gateway is superseded: any write would."""
        # Under a name of its own: the check changes nothing that anybody reads.
        await self._bus.save_state(f"{STATE_NAME}_check", b"")

    def _confirm(self, number: int) -> None:
        confirmed = self._confirmations[:number]
        del self._confirmations[:number]
        for written in confirmed:
            # Cancelled if whoever asked has given up waiting.
            if not written.done():
                written.set_result(None)
