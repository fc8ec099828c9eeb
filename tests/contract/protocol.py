"""A model of the protocol between the services, on a real bus: test_protocol drives it by steps.

Every role is a small process that makes the calls of its service in the service's order. What
decides there decides here: the learner's `GroupSource` and `Progress`, the keeper of leases, the
codec, the bus. A process moves one call at a time: the call takes effect, and its result waits for
the next step. So it can be crashed or left behind between any two effects, the reply of the last
one lost.

    gateway    read events | read account | see policy | commit (issue, acknowledge, state)
    rollout    read or take over | play
               | commit (publish, acknowledge, GENERATED) or give up or set aside
    teacher    read or take over | score
               | commit (publish, acknowledge); what was taken away is left out
    learner    claim | restore | publish | reclaim | read | settle | update
               | publish | snapshot | checkpoint | commit (TRAINED)

Memory is lost in a crash, the checkpoint is not.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdar.bus.leases import Leases
from sdar.bus.ledger import CLOSING, format_group_id, parse_group_number
from sdar.bus.protocol import Bus, Delivery
from sdar.contracts import codec
from sdar.contracts.errors import ConflictError, CorruptionError, LeaseLostError, SupersededError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import (
    GroupOutcome,
    LedgerEvent,
    ModelIdentity,
    Purpose,
    SamplingParameters,
    ScoredTrajectory,
    Task,
    TaskGroup,
    Trajectory,
    WeightsManifest,
)
from services.learner.ingest import Group, GroupSource, book_trained
from services.learner.progress import Progress
from tests.unit.learner.builders import RUN, VOCABULARY, make_config, make_item

GROUP_SIZE = 2
CONFIG = make_config(
    num_updates=4, groups_per_update=2, group_size=GROUP_SIZE, checkpoint_every=2, max_staleness=1
)
MAX_OPEN_GROUPS = (CONFIG.training.max_staleness + 1) * CONFIG.training.groups_per_update
STATE = "gateway"
STEPS_TO_THE_END = 5000
"""More steps than any run without further faults takes; reaching it means a hang."""
TEACHER_BATCH = 3
FAILS_EVERY, IS_POISON_EVERY = 7, 11
"""Every so many groups: one whose environment fails, and one that kills whoever plays it."""


class ProtocolBroken(AssertionError):
    """An invariant does not hold."""


def demand(is_true: bool, what: str) -> None:
    if not is_true:
        raise ProtocolBroken(what)


# ---- processes


class SteppedBus:
    """A process's handle on the bus: a call acts at once, its result waits for the next step."""

    def __init__(self, bus: Bus, process: Process) -> None:
        self.bus, self._process = bus, process

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def stepped(*args: Any, **kwargs: Any) -> Any:
            try:
                return await getattr(self.bus, name)(*args, **kwargs)
            finally:
                await self._process.pause(name)

        return stepped

    async def commit(
        self, publications: dict[Stream, list[bytes]], *args: Any, **kwargs: Any
    ) -> None:
        """The model remembers which task was last issued under a number."""
        try:
            await self.bus.commit(publications, *args, **kwargs)
            for payload in publications.get(Stream.TASKS, ()):
                group = codec.decode_task_group(payload)
                self._process.world.issued[group.group_id] = group.task.seed
        finally:
            await self._process.pause("commit")

    async def read(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        max_count: int,
        block_s: float = 0.0,
    ) -> Any:
        """Waits for nothing: time passes by steps."""
        return await self.__getattr__("read")(stream, group, consumer, max_count)


class Process:
    """One life after another of one role under one name.

    Args:
        main: what a life does; it is cancelled by a crash.
    """

    def __init__(self, world: World, name: str, bus: Bus) -> None:
        self.world, self.name = world, name
        self.bus: Any = SteppedBus(bus, self)
        self.is_over = False
        self.stands_after = ""
        self._task: asyncio.Task[None] | None = None
        self._parked, self._go = asyncio.Event(), asyncio.Event()

    async def main(self) -> None:
        raise NotImplementedError

    async def pause(self, after: str) -> None:
        """A point where this process can be crashed, or left behind by the others."""
        self.stands_after = after
        self._parked.set()
        await self._go.wait()
        self._go.clear()

    async def step(self) -> None:
        """To the next such point; a life that has ended is followed by the next one."""
        if self._task is None:
            self._go.clear()
            self._task = asyncio.create_task(self.main(), name=self.name)
        else:
            self._go.set()
        self._parked.clear()
        # Whichever comes first.
        while not self._parked.is_set() and not self._task.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
        if self._task.done():
            task, self._task = self._task, None
            self._note_end(task)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        error = task.exception()
        if isinstance(error, SupersededError | ConflictError | CorruptionError):
            self.is_over = True
        elif error is not None:
            raise error

    def take_suspects(self) -> list[str]:
        """Peers whose leases have run out since somebody looked."""
        found = {
            name
            for name in self.world.suspects
            if name[:-1] == self.name[:-1] and name != self.name
        }
        self.world.suspects -= found
        return sorted(found)

    async def crash(self) -> None:
        """Lose everything in memory."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])


@dataclass
class GatewayState:
    """The cursor, and events absorbed by outcome."""

    next_number: int = 0
    absorbed: Counter[str] = field(default_factory=Counter)

    def to_bytes(self) -> bytes:
        return json.dumps([self.next_number, self.absorbed]).encode()

    @classmethod
    def from_bytes(cls, data: bytes | None) -> GatewayState:
        number, absorbed = json.loads(data) if data else (0, {})
        return cls(number, Counter(absorbed))


class Gateway(Process):
    async def main(self) -> None:
        await self.bus.claim_role(ConsumerGroup.GATEWAY)
        # Before the state: a snapshot restored between the two is adopted, not overwritten.
        is_empty = await self.is_empty()
        await self.load()
        while True:
            events = self._in_hand or await self.bus.read(
                Stream.LEDGER, ConsumerGroup.GATEWAY, "gateway", 100
            )
            self._in_hand = []
            account = await self.bus.read_ledger()
            newest = await self.bus.newest(Stream.POLICY_UPDATES)
            if newest is None:
                self._in_hand = events
                continue
            if is_empty:
                # The learner restores a bus that lost its disk before it publishes its policy.
                is_empty = False
                await self.adopt()
                continue
            num_updates = codec.decode_weights_manifest(newest.payload).num_updates
            is_training = num_updates < CONFIG.training.num_updates
            await self._turn(
                events, max(0, MAX_OPEN_GROUPS - len(account.open)) if is_training else 0
            )

    async def is_empty(self) -> bool:
        account = await self.bus.read_ledger()
        return bool(account.num_issued == 0)

    async def load(self) -> None:
        self.state = GatewayState.from_bytes(await self.bus.load_state(STATE))
        leases = Leases(self.bus, Stream.LEDGER, ConsumerGroup.GATEWAY, "gateway")
        self._in_hand = await leases.take_all(100)

    async def adopt(self) -> None:
        await self.load()

    async def _turn(self, events: list[Delivery], num_groups: int) -> None:
        for event in events:
            self.state.absorbed[codec.decode_ledger_event(event.payload).outcome] += 1
        letters = [
            letter
            for letter in self.world.letters_to_retry
            if await self.bus.find_dead_letter(letter)
        ]
        self.world.letters_to_retry.intersection_update(letters)
        numbers = range(self.state.next_number, self.state.next_number + num_groups + len(letters))
        if not (events or numbers):
            return
        self.state.next_number = numbers.stop
        try:
            await self.commit(events, [self._group(number) for number in numbers], letters)
        except LeaseLostError:
            await self.load()

    async def commit(
        self, events: list[Delivery], groups: list[TaskGroup], letters: list[str]
    ) -> None:
        issued = [note(group.group_id, GroupOutcome.ISSUED) for group in groups]
        tasks = {Stream.TASKS: [codec.encode_task_group(group) for group in groups]}
        await self.bus.commit(tasks, events, {STATE: self.state.to_bytes()}, issued, letters)

    def _group(self, number: int) -> TaskGroup:
        self.world.num_tasks += 1
        task = Task("fake", "train", f"t{number}", "type", "do it", self.world.num_tasks)
        sampling = SamplingParameters(1.0, 1.0, 8)
        return TaskGroup(
            RUN, format_group_id(number), task, GROUP_SIZE, Purpose.TRAIN, 0, sampling, 2, "here:1"
        )


class Rollout(Process):
    async def main(self) -> None:
        leases = Leases(self.bus, Stream.TASKS, ConsumerGroup.ROLLOUT, self.name)
        deliveries: list[Delivery] = []
        while page := await leases.take_back(10):
            deliveries += page
        while True:
            for delivery in deliveries:
                await self._play(delivery)
            deliveries = []
            for suspect in self.take_suspects():
                deliveries += await self._take_over(suspect)
            deliveries += await self.bus.read(Stream.TASKS, ConsumerGroup.ROLLOUT, self.name, 1)

    async def _take_over(self, held_by: str) -> list[Delivery]:
        return await self.bus.reclaim(
            Stream.TASKS, ConsumerGroup.ROLLOUT, self.name, 0.0, 10, held_by=held_by
        )

    async def _play(self, delivery: Delivery) -> None:
        group = codec.decode_task_group(delivery.payload)
        number, newest = (
            parse_group_number(group.group_id),
            await self.bus.newest(Stream.POLICY_UPDATES),
        )
        assert number is not None
        version = codec.decode_weights_manifest(newest.payload).policy_version if newest else 0
        try:
            if number % IS_POISON_EVERY == IS_POISON_EVERY - 1:
                await self.bus.dead_letter(
                    delivery, "poison", [note(group.group_id, GroupOutcome.FAILED)]
                )
            elif number % FAILS_EVERY == FAILS_EVERY - 1:
                await self.commit({}, delivery, note(group.group_id, GroupOutcome.FAILED))
            else:
                attempt = delivery.num_deliveries - 1
                played = [_play(group, index, attempt, version) for index in range(GROUP_SIZE)]
                payloads = [codec.encode_trajectory(trajectory) for trajectory in played]
                await self.commit(
                    {Stream.TRAJECTORIES: payloads},
                    delivery,
                    note(group.group_id, GroupOutcome.GENERATED),
                )
        except LeaseLostError:
            return  # Another attempt is under way.

    async def commit(
        self, publications: dict[Stream, list[bytes]], delivery: Delivery, event: LedgerEvent
    ) -> None:
        await self.bus.commit(publications, [delivery], transitions=[event])


class Teacher(Process):
    async def main(self) -> None:
        leases = Leases(self.bus, Stream.TRAJECTORIES, ConsumerGroup.TEACHER, self.name)
        deliveries: list[Delivery] = []
        while page := await leases.take_back(10):
            deliveries += page
        while True:
            if deliveries:
                await self._score(deliveries)
            deliveries = []
            for suspect in self.take_suspects():
                deliveries += await self._take_over(suspect)
            deliveries += await self.bus.read(
                Stream.TRAJECTORIES, ConsumerGroup.TEACHER, self.name, TEACHER_BATCH
            )

    async def _take_over(self, held_by: str) -> list[Delivery]:
        return await self.bus.reclaim(
            Stream.TRAJECTORIES, ConsumerGroup.TEACHER, self.name, 0.0, 10, held_by=held_by
        )

    async def _score(self, deliveries: list[Delivery]) -> None:
        while deliveries:
            payloads = [
                codec.encode_scored_trajectory(_score(codec.decode_trajectory(d.payload)))
                for d in deliveries
            ]
            try:
                return await self.commit(payloads, deliveries)
            except LeaseLostError:
                deliveries = await self.bus.renew(deliveries)

    async def commit(self, payloads: list[bytes], deliveries: list[Delivery]) -> None:
        await self.bus.commit({Stream.SCORED: payloads}, deliveries)


@dataclass(frozen=True)
class Checkpoint:
    """What is durable.

    `weights` is what the weights depend on: the groups of every update and their tasks, in order.
    """

    progress: dict[str, Any]
    weights: tuple[tuple[str, int], ...]
    snapshot: bytes


class Learner(Process):
    async def main(self) -> None:
        self.world.checkpoint_owner = self
        await self._resume()
        while self.progress.num_updates < CONFIG.training.num_updates:
            looked = asyncio.Event()
            groups = await self.source.next_batch(self.progress, looked, beat=looked.set)
            if groups is not None:
                await self._update(groups)
        while True:
            await self.source.cancel_all("run finished")

    async def _resume(self) -> None:
        checkpoint = self.world.checkpoint
        self.progress, self.weights = Progress(), ()
        await self.bus.claim_role(ConsumerGroup.LEARNER)
        if checkpoint is not None:
            self.progress, self.weights = (
                Progress.from_json(checkpoint.progress),
                checkpoint.weights,
            )
            await self.restore(checkpoint)
        newest = await self.bus.newest(Stream.POLICY_UPDATES)
        announced = codec.decode_weights_manifest(newest.payload).policy_version if newest else -1
        if max(announced, *self.world.published) > self.progress.policy_version:
            self.progress = self.progress.continue_after(max(announced, *self.world.published))
        if announced != self.progress.policy_version:
            await self._publish()
        self.unacknowledged: list[Delivery] = []
        self.unbooked: list[LedgerEvent] = []
        self.source = self.build_source()
        await self.source.reclaim(self.progress)

    def build_source(self) -> GroupSource:
        return GroupSource(CONFIG, self.bus, "learner", VOCABULARY)

    async def restore(self, checkpoint: Checkpoint) -> None:
        trained = [parse_group_number(group_id) for group_id, _ in checkpoint.weights]
        await self.bus.restore_snapshot(checkpoint.snapshot, trained)

    async def _update(self, groups: list[Group]) -> None:
        self.weights += tuple(
            (group.group_id, group.items[0].trajectory.task.seed) for group in groups
        )
        self.progress = self.progress.after_update(group.group_id for group in groups)
        self.unacknowledged += [delivery for group in groups for delivery in group.deliveries]
        self.unbooked += [
            book_trained(CONFIG, group, self.progress.policy_version) for group in groups
        ]
        await self._publish()
        if self.progress.num_updates % CONFIG.training.checkpoint_every == 0:
            await self.make_durable()

    async def _publish(self) -> None:
        """The manifest in the store comes first, then its announcement."""
        self.world.published.add(self.progress.policy_version)
        await self.pause("store")
        manifest = WeightsManifest(
            RUN,
            self.progress.policy_version,
            "p",
            (),
            0,
            ModelIdentity("m", "f"),
            0.0,
            self.progress.num_updates,
        )
        await self.bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(manifest)])

    async def make_durable(self) -> None:
        await self.write_checkpoint()
        await self.acknowledge()

    async def write_checkpoint(self) -> None:
        snapshot = await self.bus.take_snapshot()
        if self.world.checkpoint_owner is not self:
            raise ConflictError("Another learner holds the checkpoint directory.")
        self.world.checkpoint = self.build_checkpoint(snapshot)
        await self.pause("checkpoint")

    def build_checkpoint(self, snapshot: bytes) -> Checkpoint:
        return Checkpoint(self.progress.to_json(), self.weights, snapshot)

    async def acknowledge(self) -> None:
        await self.bus.commit({}, self.unacknowledged, transitions=self.unbooked)
        self.unacknowledged, self.unbooked = [], []


def note(group_id: str, outcome: GroupOutcome) -> LedgerEvent:
    return LedgerEvent(RUN, group_id, outcome, GROUP_SIZE, 0)


def _play(group: TaskGroup, index: int, attempt: int, version: int) -> Trajectory:
    reward = float(index)  # Not the same for all episodes: there is something to learn.
    item = make_item(
        group.group_id, index, reward=reward, version=version, attempt=attempt, num_turns=1
    )
    return dataclasses.replace(item.trajectory, task=group.task)


def _score(trajectory: Trajectory) -> ScoredTrajectory:
    index = trajectory.episode_index
    version = trajectory.min_policy_version
    attempt = trajectory.attempt
    score = make_item(
        trajectory.group_id, index, version=version, attempt=attempt, num_turns=1
    ).score
    return ScoredTrajectory(trajectory, score)


# ---- the whole


ROLES: dict[str, type[Process]] = {
    "gateway": Gateway,
    "rollout-1": Rollout,
    "rollout-2": Rollout,
    "teacher-1": Teacher,
    "teacher-2": Teacher,
    "learner": Learner,
}


class World:
    """The processes, the durable things beside the bus, and what must always be true of them.

    Args:
        roles: by process name; a mutant replaces one.
    """

    UNIQUE: ClassVar[tuple[str, ...]] = ("gateway", "learner")

    def __init__(self, roles: dict[str, type[Process]]) -> None:
        self.roles = roles
        self.checkpoint: Checkpoint | None = None
        self.checkpoint_owner: Process | None = None
        self.published: set[int] = {-1}
        self.num_tasks = 0
        self.issued: dict[str, int] = {}
        self.suspects: set[str] = set()
        self.letters_to_retry: set[str] = set()
        self.processes: dict[str, Process] = {}
        self.elders: list[Process] = []
        self.num_disks_lost = 0

    # -- what a kind of bus must offer

    async def open(self) -> None:
        """Make an empty bus."""
        raise NotImplementedError

    def connect(self, name: str) -> Bus:
        """A new process's handle."""
        raise NotImplementedError

    async def list_unacknowledged(self, stream: Stream, group: ConsumerGroup) -> list[bytes]:
        raise NotImplementedError

    async def lose_disk(self) -> None:
        """The server comes back empty; processes keep what they have in memory."""
        raise NotImplementedError

    async def close(self) -> None:
        for process in (*self.processes.values(), *self.elders):
            await process.crash()

    # -- what can happen

    async def start(self) -> None:
        await self.open()
        for name in self.roles:
            self._spawn(name)

    def _spawn(self, name: str) -> None:
        self.processes[name] = self.roles[name](self, name, self.connect(name))

    async def step(self, name: str, count: int) -> None:
        """A process moves.

        One that was refused its role is followed by another, as its supervisor sees to.
        """
        for _ in range(count):
            await self.processes[name].step()
            if self.processes[name].is_over:
                self._spawn(name)

    async def crash(self, name: str) -> None:
        await self.processes[name].crash()

    def take_over(self, name: str) -> None:
        """Somebody starts the role again while its process is only paused; it will go on."""
        self.elders.append(self.processes[name])
        self._spawn(name)

    async def step_elders(self, count: int) -> None:
        for elder in self.elders:
            for _ in range(count):
                if not elder.is_over:
                    await elder.step()

    async def step_until(self, name: str, after: str, max_rounds: int) -> bool:
        """Move everybody until this process stands after that call; returns whether it does."""
        for _ in range(max_rounds):
            for each in self.roles:
                await self.step(each, 1)
                if each == name and self.processes[name].stands_after == after:
                    return True
        return False

    async def retry_letters(self) -> None:
        self.letters_to_retry.update(
            letter.letter_id for letter in await self._any_bus.list_dead_letters()
        )

    @property
    def _any_bus(self) -> Bus:
        return self.processes["rollout-1"].bus.bus

    # -- what must be true

    async def check(self) -> None:
        account = await self._any_bus.read_ledger()
        demand(account.find_gap() == 0, f"the account has a gap: {account.counts()}")
        closed = {outcome: await self._any_bus.list_closed(outcome) for outcome in CLOSING}
        numbers = sorted(
            [*account.open, *(number for numbers in closed.values() for number in numbers)]
        )
        demand(
            numbers == list(range(account.num_issued)),
            f"not every issued group is open or closed once: {numbers}",
        )
        self._check_weights(
            set(closed[GroupOutcome.TRAINED]), account.open, is_known=account.num_issued > 0
        )
        await self._check_cursor(account.num_issued)
        await self._check_kept(account.open)

    def _check_weights(
        self, booked: set[int], open_groups: dict[int, bool], *, is_known: bool
    ) -> None:
        learner = self.processes["learner"]
        kept = self.checkpoint.weights if self.checkpoint else ()
        for weights in (kept, getattr(learner, "weights", ())):
            demand(len(dict(weights)) == len(weights), f"trained twice: {sorted(weights)}")
        durable = {parse_group_number(group_id) for group_id, _ in kept}
        false = [
            name
            for name, task in kept
            if parse_group_number(name) in booked and self.issued[name] != task
        ]
        demand(
            not false, f"booked as trained, but under these names other tasks were trained: {false}"
        )
        demand(booked <= durable, f"booked as trained and not durable: {booked - durable}")
        if is_known:
            demand(
                durable - booked <= open_groups.keys(),
                f"durable, closed, and not as trained: {durable - booked}",
            )

    async def _check_cursor(self, num_issued: int) -> None:
        state = GatewayState.from_bytes(await self._any_bus.load_state(STATE))
        demand(
            state.next_number == num_issued,
            f"the cursor says {state.next_number}, the account {num_issued}",
        )

    async def _check_kept(self, open_groups: dict[int, bool]) -> None:
        """What an open group needs is on a stream, unacknowledged; one attempt gets through."""
        tasks = Counter(
            codec.decode_task_group(data).group_id
            for data in await self.list_unacknowledged(Stream.TASKS, ConsumerGroup.ROLLOUT)
        )
        episodes: defaultdict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
        for data in await self.list_unacknowledged(Stream.TRAJECTORIES, ConsumerGroup.TEACHER):
            trajectory = codec.decode_trajectory(data)
            episodes[trajectory.group_id][trajectory.attempt, trajectory.episode_index] += 1
        for data in await self.list_unacknowledged(Stream.SCORED, ConsumerGroup.LEARNER):
            trajectory = codec.decode_scored_trajectory(data).trajectory
            episodes[trajectory.group_id][trajectory.attempt, trajectory.episode_index] += 1
        for number, is_generated in open_groups.items():
            group_id = format_group_id(number)
            found = episodes[group_id]
            attempts = {attempt for attempt, _ in found}
            if is_generated:
                whole = {(attempt, index) for attempt in attempts for index in range(GROUP_SIZE)}
                demand(
                    len(attempts) == 1 and found.keys() == whole,
                    f"{group_id} is buffered, its episodes are {found}",
                )
                demand(set(found.values()) == {1}, f"{group_id} has an episode twice: {found}")
                demand(not tasks[group_id], f"{group_id} is played and its task is still there")
            else:
                demand(
                    tasks[group_id] == 1 and not found,
                    f"{group_id} is running: {tasks[group_id]} tasks, episodes {found}",
                )

    async def finish(self) -> None:
        """Run everything to its end without further faults: nothing may be left over."""
        for elder in self.elders:
            await elder.crash()
        self.suspects = set()
        for _ in range(STEPS_TO_THE_END // len(self.roles)):
            for name in self.roles:
                await self.step(name, 1)
            if await self._is_quiet():
                break
        account = await self._any_bus.read_ledger()
        demand(not account.open, f"never closed: {sorted(account.open)}")
        demand(
            self.checkpoint is not None
            and self.checkpoint.progress["num_updates"] == CONFIG.training.num_updates,
            f"the run does not end: {account.counts()}",
        )
        await self.check()
        await self._check_absorbed()

    async def _is_quiet(self) -> bool:
        is_done = (
            self.checkpoint is not None
            and self.checkpoint.progress["num_updates"] == CONFIG.training.num_updates
        )
        left = [await self.list_unacknowledged(*pair) for pair in WIRED]
        return is_done and not any(left) and not (await self._any_bus.read_ledger()).open

    async def _check_absorbed(self) -> None:
        """The gateway has seen every end exactly once.

        What was booked by a restored snapshot has no event.
        """
        if self.num_disks_lost:
            return
        state = GatewayState.from_bytes(await self._any_bus.load_state(STATE))
        closed = (await self._any_bus.read_ledger()).closed
        for outcome, count in closed.items():
            demand(
                state.absorbed[outcome] == count,
                f"{count} groups {outcome}, the gateway saw {state.absorbed[outcome]}",
            )


CONSUMERS: dict[Stream, Collection[ConsumerGroup]] = {
    Stream.TASKS: (ConsumerGroup.ROLLOUT,),
    Stream.TRAJECTORIES: (ConsumerGroup.TEACHER,),
    Stream.SCORED: (ConsumerGroup.LEARNER,),
    Stream.LEDGER: (ConsumerGroup.GATEWAY,),
}
WIRED = [(stream, group) for stream, groups in CONSUMERS.items() for group in groups]


def next_millisecond() -> None:
    """Entry ids hold the time: those of a server that came back empty are later than any before."""
    began = int(time.time() * 1000)
    while int(time.time() * 1000) <= began:
        pass
