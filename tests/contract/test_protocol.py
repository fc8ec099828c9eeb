"""The protocol's model checked by machine: crashes, pauses, expired leases, lost disks anywhere.

After every step: both equations of the account hold, every issued group is open or closed exactly
once, no group is trained twice, what is booked as trained is durable, and all that an open group
needs to end is on a stream and acknowledged by nobody. At the end nothing is left over. The same
machine finds every planted mutant: the invariants have teeth.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import redis.asyncio
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.protocol import BEFORE_FIRST, Bus, Delivery, parse_entry_id
from sdar.bus.redis import RedisBus
from sdar.contracts import codec
from sdar.contracts.errors import LeaseLostError
from sdar.contracts.streams import ConsumerGroup, RunKeys, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent, TaskGroup
from sdar.in_process.memory_bus import MemoryBus
from services.learner.ingest import GroupSource
from services.learner.progress import Progress
from tests.contract.protocol import (
    CONFIG,
    CONSUMERS,
    ROLES,
    STATE,
    Checkpoint,
    Gateway,
    Learner,
    Process,
    ProtocolBroken,
    Rollout,
    Teacher,
    World,
    next_millisecond,
    note,
)
from tests.unit.learner.builders import VOCABULARY

QUIET = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
]
COMMON = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": QUIET,
    "report_multiple_bugs": False,
}


EXAMPLES = 60
MUTANT_EXAMPLES = 1000
STEPS = 25
REDIS_SEEDS, REDIS_STEPS = 8, 40
ROUNDS_TO_A_POINT = 60
MAX_DISKS_LOST = 2


class MemoryWorld(World):
    bus_kind: type[MemoryBus] = MemoryBus

    async def open(self) -> None:
        self._bus = self.bus_kind(CONSUMERS)

    def connect(self, name: str) -> Bus:
        return self._bus.view(name)

    async def list_unacknowledged(self, stream: Stream, group: ConsumerGroup) -> list[bytes]:
        log = self._bus._store.logs[stream]
        position = log.groups[group]
        return [
            data
            for entry, data in log.entries.items()
            if entry in position.pending or entry > position.last_delivered
        ]

    async def lose_disk(self) -> None:
        next_millisecond()
        self.num_disks_lost += 1
        self._bus = self.bus_kind(CONSUMERS)
        for process in (*self.processes.values(), *self.elders):
            process.bus.bus._store = self._bus._store
        self.letters_to_retry.clear()


NAMES = st.sampled_from(sorted(ROLES))
LEARNER_CALLS = ["reclaim", "store", "publish", "take_snapshot", "checkpoint", "commit", "read"]
GATEWAY_CALLS = ["claim_role", "load_state", "reclaim", "read", "commit"]
WORKER_CALLS = ["read", "commit"]
WORKER_NAMES = ["rollout-1", "rollout-2", "teacher-1", "teacher-2"]
RESTARTS = st.lists(st.tuples(st.sampled_from(World.UNIQUE), st.integers(1, 5)), max_size=4)


class ProtocolMachine(RuleBasedStateMachine):
    """Drives a world; each rule is one fault or some steps."""

    kind: type[World] = MemoryWorld
    roles: ClassVar[dict[str, type[Process]]] = ROLES

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = self.kind(self.roles)
        self.is_broken = False
        self.do(self.world.start())

    def do(self, work: Any) -> None:
        try:
            self.loop.run_until_complete(work)
        except BaseException:
            self.is_broken = True
            raise

    @rule(name=NAMES, count=st.integers(1, 8))
    def step(self, name: str, count: int) -> None:
        self.do(self.world.step(name, count))

    @rule(rounds=st.integers(1, 30))
    def step_all(self, rounds: int) -> None:
        for _ in range(rounds):
            for name in ROLES:
                self.do(self.world.step(name, 1))

    @rule(name=NAMES)
    def crash(self, name: str) -> None:
        self.do(self.world.crash(name))

    @rule(name=st.sampled_from(WORKER_NAMES))
    def expire_leases(self, name: str) -> None:
        """Silent for too long, dead or paused: others take over what it holds, and it may go on."""
        self.world.suspects.add(name)

    @rule(name=st.sampled_from(World.UNIQUE), count=st.integers(0, 10))
    def take_over(self, name: str, count: int) -> None:
        self.world.take_over(name)
        self.do(self.world.step(name, count))

    @rule(count=st.integers(1, 12))
    def step_elders(self, count: int) -> None:
        self.do(self.world.step_elders(count))

    @rule()
    def retry_dead_letters(self) -> None:
        self.do(self.world.retry_letters())

    @rule(call=st.sampled_from(LEARNER_CALLS), is_taken_over=st.booleans())
    def strike_the_learner_right_after(self, call: str, is_taken_over: bool) -> None:
        """The moments that matter, however rare: between two effects of one piece of work."""
        self._strike("learner", call, is_taken_over)

    @rule(call=st.sampled_from(GATEWAY_CALLS), is_taken_over=st.booleans())
    def strike_the_gateway_right_after(self, call: str, is_taken_over: bool) -> None:
        self._strike("gateway", call, is_taken_over)

    @rule(name=st.sampled_from(WORKER_NAMES), call=st.sampled_from(WORKER_CALLS))
    def strike_a_worker_right_after(self, name: str, call: str) -> None:
        self._strike(name, call, is_taken_over=False)

    def _strike(self, name: str, call: str, is_taken_over: bool) -> None:
        self.do(self.world.step_until(name, call, ROUNDS_TO_A_POINT))
        if is_taken_over:
            self.world.take_over(name)
        else:
            self.do(self.world.crash(name))

    @precondition(
        lambda self: (
            self.world.checkpoint is not None and self.world.num_disks_lost < MAX_DISKS_LOST
        )
    )
    @rule(restarts=RESTARTS)
    def lose_disk(self, restarts: list[tuple[str, int]]) -> None:
        self.do(self.world.lose_disk())
        for name, count in restarts:
            self.do(self.world.step(name, count))

    @invariant()
    def holds(self) -> None:
        self.do(self.world.check())

    def teardown(self) -> None:
        try:
            if not self.is_broken:
                self.do(self.world.finish())
        finally:
            self.loop.run_until_complete(self.world.close())
            self.loop.close()


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def run(machine: type[ProtocolMachine], max_examples: int, step_count: int) -> None:
    limits = settings(
        max_examples=max_examples, stateful_step_count=step_count, phases=[Phase.generate], **COMMON
    )
    run_state_machine_as_test(machine, settings=limits)


def test_no_order_of_crashes_pauses_expiries_take_overs_and_lost_disks_breaks_an_invariant() -> (
    None
):
    run(ProtocolMachine, max_examples=EXAMPLES, step_count=STEPS)


# ---- mutants: each breaks the protocol in one place, and is found


class AcknowledgesBeforeTheCheckpoint(Learner):
    async def make_durable(self) -> None:
        await self.acknowledge()
        await self.write_checkpoint()


class BooksTrainedBeforeItIsDurable(Learner):
    async def make_durable(self) -> None:
        await self.bus.commit({}, transitions=self.unbooked)
        await super().make_durable()


class ForgetsWhatItTrained(Learner):
    def build_checkpoint(self, snapshot: bytes) -> Checkpoint:
        kept = super().build_checkpoint(snapshot)
        progress = kept.progress | {"trained_groups": [[] for _ in kept.progress["trained_groups"]]}
        return dataclasses.replace(kept, progress=progress)


class DropsDurableEntriesUnbooked(Learner):
    """Entries of a trained group, left between checkpoint and commit, are only duplicates."""

    def build_source(self) -> GroupSource:
        return _UnbookedSource(CONFIG, self.bus, "learner", VOCABULARY)


class _UnbookedSource(GroupSource):
    async def reclaim(self, progress: Progress) -> None:
        self._trained.add(progress.list_trained())
        await super().reclaim(dataclasses.replace(progress, trained_groups=()))


class NeverRestores(Learner):
    async def restore(self, checkpoint: Checkpoint) -> None:
        return


class KeepsItsFirstSnapshot(Learner):
    def build_checkpoint(self, snapshot: bytes) -> Checkpoint:
        before = self.world.checkpoint
        return super().build_checkpoint(snapshot if before is None else before.snapshot)


class IssuesBeforeItSavesItsCursor(Gateway):
    async def commit(
        self, events: list[Delivery], groups: list[TaskGroup], letters: list[str]
    ) -> None:
        issued = [note(group.group_id, GroupOutcome.ISSUED) for group in groups]
        tasks = {Stream.TASKS: [codec.encode_task_group(group) for group in groups]}
        await self.bus.commit(tasks, events, None, issued, letters)
        await self.bus.save_state(STATE, self.state.to_bytes())


class AcknowledgesEventsOnTheirOwn(Gateway):
    async def commit(
        self, events: list[Delivery], groups: list[TaskGroup], letters: list[str]
    ) -> None:
        await self.bus.acknowledge(events)
        await super().commit([], groups, letters)


class IssuesIntoAnEmptyBus(Gateway):
    async def adopt(self) -> None:
        return


class LoadsItsStateBeforeItLooksForOne(Gateway):
    async def is_empty(self) -> bool:
        await super().load()
        self.is_loaded = True
        return await super().is_empty()

    async def load(self) -> None:
        if not self.is_loaded:
            await super().load()
        self.is_loaded = False


class PublishesThenAcknowledges(Rollout):
    async def commit(
        self, publications: dict[Stream, list[bytes]], delivery: Delivery, event: LedgerEvent
    ) -> None:
        await self.bus.commit(publications, transitions=[event])
        await self.bus.acknowledge([delivery])


class AcknowledgesThenPublishes(Teacher):
    async def commit(self, payloads: list[bytes], deliveries: list[Delivery]) -> None:
        await self.bus.acknowledge(deliveries)
        await self.bus.publish(Stream.SCORED, payloads)


class PublishesWhatWasTakenAway(Teacher):
    async def commit(self, payloads: list[bytes], deliveries: list[Delivery]) -> None:
        try:
            await super().commit(payloads, deliveries)
        except LeaseLostError:
            await self.bus.publish(Stream.SCORED, payloads)
            await self.bus.acknowledge(deliveries)


class UnfencedBus(MemoryBus):
    """Takes results of whoever comes, held or not."""

    def _check_fences(
        self,
        acknowledgements: Sequence[Delivery],
        needs_leases: bool,
        retired_letters: Sequence[str] = (),
    ) -> list[Delivery]:
        return super()._check_fences(acknowledgements, False, retired_letters)


class BusWithoutTenures(MemoryBus):
    """Lets everybody write who once held a role."""

    def _check_role(self) -> None:
        return


class BusThatLetsTheSupersededRead(MemoryBus):
    async def read(self, *args: Any, **kwargs: Any) -> list[Delivery]:
        held, self._held_tenures = self._held_tenures, {}
        try:
            return await super().read(*args, **kwargs)
        finally:
            self._held_tenures = held


class BusThatTrimsWhatWasDelivered(MemoryBus):
    """Drops what a consumer has in hand, as a stream bounded by length does."""

    def _trim(self, streams: Iterable[Stream]) -> int:
        for log in (self._store.logs[stream] for stream in streams if stream in CONSUMERS):
            for group in log.groups.values():
                log.drop_before(group.last_delivered)
                group.pending = {
                    entry: claim for entry, claim in group.pending.items() if entry in log.entries
                }
        return 0


class BusThatBooksOnTheSide(MemoryBus):
    """The account is a second transaction: a crash or a refusal between the two shows."""

    def _book(self, event: LedgerEvent) -> bool:
        if event.outcome is GroupOutcome.GENERATED and self._name == "rollout-2":
            return True
        return super()._book(event)


LEARNERS = [
    AcknowledgesBeforeTheCheckpoint,
    BooksTrainedBeforeItIsDurable,
    ForgetsWhatItTrained,
    DropsDurableEntriesUnbooked,
    NeverRestores,
    KeepsItsFirstSnapshot,
]
GATEWAYS = [
    IssuesBeforeItSavesItsCursor,
    AcknowledgesEventsOnTheirOwn,
    IssuesIntoAnEmptyBus,
    LoadsItsStateBeforeItLooksForOne,
]
MUTANT_ROLES: list[tuple[str, type[Process]]] = [
    *itertools.product(["learner"], LEARNERS),
    *itertools.product(["gateway"], GATEWAYS),
    ("rollout", PublishesThenAcknowledges),
    ("teacher", AcknowledgesThenPublishes),
    ("teacher", PublishesWhatWasTakenAway),
]
MUTANT_BUSES = [
    UnfencedBus,
    BusWithoutTenures,
    BusThatLetsTheSupersededRead,
    BusThatTrimsWhatWasDelivered,
    BusThatBooksOnTheSide,
]


@pytest.mark.parametrize(
    ("role", "mutant"), MUTANT_ROLES, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_role_that_breaks_the_protocol_is_found(role: str, mutant: type[Process]) -> None:
    class Mutated(ProtocolMachine):
        roles: ClassVar = {
            name: mutant if name.startswith(role) else kind for name, kind in ROLES.items()
        }

    with pytest.raises(ProtocolBroken):
        run(Mutated, max_examples=MUTANT_EXAMPLES, step_count=STEPS)


@pytest.mark.parametrize("mutant", MUTANT_BUSES)
def test_a_bus_that_breaks_its_promise_is_found(mutant: type[MemoryBus]) -> None:
    class MutatedWorld(MemoryWorld):
        bus_kind = mutant

    class Mutated(ProtocolMachine):
        kind = MutatedWorld

    with pytest.raises(ProtocolBroken):
        run(Mutated, max_examples=MUTANT_EXAMPLES, step_count=STEPS)


# ---- the same machine on a real Redis, in a short form


class RedisWorld(World):
    """Every process has a connection of its own.

    The server may be killed; its disk stays, or is lost with all it held.
    """

    server: ClassVar[EmbeddedRedis]

    async def open(self) -> None:
        self._run_id = f"run-{secrets.token_hex(4)}"
        self._keys = RunKeys(self._run_id)
        self._redis = redis.asyncio.Redis.from_url(self.server.url)
        self._buses: list[RedisBus] = []

    def connect(self, name: str) -> Bus:
        self._buses.append(RedisBus(self.server.url, self._run_id, CONSUMERS))
        return self._buses[-1]

    async def list_unacknowledged(self, stream: Stream, group: ConsumerGroup) -> list[bytes]:
        key = self._keys.stream(stream)
        if not await self._redis.exists(key):
            return []
        groups = {info["name"].decode(): info for info in await self._redis.xinfo_groups(key)}
        entries = [
            (entry_id.decode(), fields) for entry_id, fields in await self._redis.xrange(key)
        ]
        pending: set[str] = set()
        last = BEFORE_FIRST
        if str(group) in groups:
            page = await self._redis.xpending_range(key, str(group), "-", "+", 1000)
            pending = {item["message_id"].decode() for item in page}
            last = groups[str(group)]["last-delivered-id"].decode()
        return [
            data
            for entry_id, fields in entries
            for data in fields.values()
            if entry_id in pending or parse_entry_id(entry_id) > parse_entry_id(last)
        ]

    async def lose_disk(self) -> None:
        self.num_disks_lost += 1
        await self._redis.flushall()
        self.letters_to_retry.clear()

    async def restart_under(self, name: str) -> None:
        """Kill the server while a process makes a call; both come to their end."""
        stepping = asyncio.create_task(self.step(name, 1))
        await asyncio.sleep(0)
        await asyncio.to_thread(self.server.kill)
        await asyncio.to_thread(self.server.start)
        await stepping
        await self._redis.connection_pool.disconnect()

    async def close(self) -> None:
        await super().close()
        for bus in self._buses:
            await bus.close()
        await self._redis.aclose()


class RedisMachine(ProtocolMachine):
    kind = RedisWorld
    world: RedisWorld

    def restart_redis(self, name: str) -> None:
        self.do(self.world.restart_under(name))

    def take_random_step(self, rng: random.Random) -> None:
        """One fault or some work.

        Not hypothesis: what a server does depends on time, so no example could be replayed.
        """
        name = rng.choice(sorted(ROLES))
        worker = rng.choice(WORKER_NAMES)
        unique = rng.choice(World.UNIQUE)
        faults: list[Callable[[], None]] = [
            lambda: self.crash(name),
            lambda: self.expire_leases(worker),
            lambda: self.take_over(unique, rng.randint(0, 10)),
            lambda: self.step_elders(rng.randint(1, 12)),
            self.retry_dead_letters,
            lambda: self._strike("learner", rng.choice(LEARNER_CALLS), rng.random() < 0.5),
            lambda: self._strike("gateway", rng.choice(GATEWAY_CALLS), rng.random() < 0.5),
            lambda: self._strike(worker, rng.choice(WORKER_CALLS), False),
            lambda: self.restart_redis(name),
        ]
        if self.world.checkpoint is not None and self.world.num_disks_lost < MAX_DISKS_LOST:
            faults.append(lambda: self.lose_disk([(unique, 3)]))
        rng.choice(faults)()
        self.step_all(rng.randint(1, 10))
        self.holds()


@pytest.mark.parametrize("seed", range(REDIS_SEEDS))
def test_the_same_holds_on_a_real_redis_that_is_killed_and_comes_back(
    tmp_path: Path, seed: int
) -> None:
    with EmbeddedRedis(tmp_path, fsync="always") as server:
        RedisWorld.server = server
        machine = RedisMachine()
        try:
            rng = random.Random(seed)
            for _ in range(REDIS_STEPS):
                machine.take_random_step(rng)
        finally:
            machine.teardown()
