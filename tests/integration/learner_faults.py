"""Runs as a process of its own that forks each life of a learner: torch is imported once.

python -m tests.integration.learner_faults DIRECTORY every-state|every-line

A run of three updates is played once without a fault. Then, from each of three beginnings, a life
of the learner is killed before a line of its own files, and the next life goes on to the end. Where
a life is killed matters only through what it has left behind: the state of Redis, of the
checkpoints and of the weight store. `every-state` kills a life in each state that it leads these
through, however often it executes a line; `every-line` kills before every line where it is first
reached.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import redis
import structlog
import torch

from sdar.bus import leases
from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.redis import RedisBus
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.model.causal_lm import load_causal_lm
from sdar.process.telemetry import Health
from sdar.weights import garbage, manifests, shards, version_objects
from sdar.weights import store as weight_store
from sdar.weights.store import WeightStore
from services.learner import (
    checkpoint,
    durability,
    ingest,
    progress,
    publishing,
    torch_thread,
    train,
)
from services.learner.checkpoint import read_trained_groups
from services.learner.durability import Durability
from services.learner.ranks import _import_deepspeed
from services.learner.service import open_learner
from services.learner.train import Learner
from tests.faults import KILLED, Line, die, run_forked, trace_lines
from tests.support import until
from tests.unit.learner.builders import (
    RUN,
    issue,
    make_config,
    make_group,
    read_account,
    read_journal,
)

LEARNER = (train, publishing, durability, torch_thread, ingest, checkpoint, progress, leases)
WEIGHTS = (weight_store, version_objects, shards, manifests, garbage)
FILES = tuple(str(module.__file__) for module in (*LEARNER, *WEIGHTS))
NUM_WORKERS = 3
"""More than there are cores: a life spends half its time waiting for its stream."""
CONFIG = make_config(
    num_updates=3, checkpoint_every=2, max_staleness=1, num_minibatches=2, warmup_updates=2
)

Watch = Callable[[Line], None]


@dataclass(frozen=True, slots=True)
class Saved:
    """A copy of the learner's directory, and each key of Redis with its value and lifetime."""

    path: Path
    keys: dict[bytes, tuple[int, bytes]]


async def fill(url: str) -> None:
    """Of ten groups six can be trained: five have old tokens, of which one goes stale; two are
    spare; one is unreadable.

    One entry comes twice, and one group's second episode comes last.
    """
    bus = RedisBus(url, RUN, CONFIG.stream_consumers)
    await issue(bus, range(2))
    await issue(bus, range(2, 3), make=lambda group_id: make_group(group_id, largest_token=100_000))
    await issue(bus, range(3, 6), version=1)
    await issue(bus, range(6, 9), num_turns=4)
    await bus.publish(
        Stream.SCORED, [entry.payload for entry in await bus.tail(Stream.SCORED, "0-0", 1)]
    )
    await bus.close()


async def live(directory: Path, url: str, watch: Watch | None) -> None:
    """One life of a learner to the run's end, `watch` called at each line; then what it left."""
    bus = RedisBus(url, RUN, CONFIG.stream_consumers, client_name="learner")
    store = WeightStore(str(directory / "weights"), RUN)
    health = Health()
    if watch is not None:
        trace_lines(FILES, watch)
    async with open_learner(
        CONFIG, bus, store, directory / "checkpoints", consumer="learner", health=health
    ) as learner:
        stopping = asyncio.Event()
        task = asyncio.create_task(learner.run(stopping))
        await until(lambda: task.done() or health.detail == "run finished", timeout_s=120)
        finished = health._last_beat
        await until(lambda: task.done() or health._last_beat > finished, timeout_s=120)
        stopping.set()
        await task
    sys.settrace(None)
    (directory / "result.json").write_text(json.dumps(await examine(directory, bus, store)))
    await bus.close()


async def examine(directory: Path, bus: RedisBus, store: WeightStore) -> dict[str, object]:
    """All that must be the same after any fault."""
    newest = max((directory / "checkpoints").glob("update-*"))
    files = json.loads((newest / "manifest.json").read_bytes())["files"]
    published = store.fetch_manifest()
    events = [(event.group_id, str(event.outcome)) for event in await read_journal(bus)]
    tensors = {name: about for name, about in files.items() if name.endswith(".safetensors")}
    checksums = {name: about["sha256"] for name, about in tensors.items()}
    in_store = {entry.name: entry.sha256 for entry in published.tensors}
    return {
        "sha256": checksums,
        "published": in_store,
        "num_updates": published.num_updates,
        "trained": read_trained_groups(directory / "checkpoints"),
        "account": await read_account(bus),
        "closed": sorted(event for event in events if event[1] != "generated"),
        "num_pending": (await bus.stream_lag(Stream.SCORED, ConsumerGroup.LEARNER)).num_pending,
    }


class World:
    """What outlives a learner: a Redis and a directory.

    It can be saved, and be brought back as it was.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "learner"
        self.directory.mkdir(parents=True)
        self._server = EmbeddedRedis(directory / "redis")
        self.url = self._server.start()
        self._redis = redis.Redis.from_url(self.url)
        self._num_asked = 0

    def save(self, path: Path) -> Saved:
        shutil.copytree(self.directory, path)
        keys = self._redis.keys()
        return Saved(
            path, {key: (max(0, self._redis.pttl(key)), self._redis.dump(key)) for key in keys}
        )

    def load(self, saved: Saved) -> None:
        shutil.rmtree(self.directory)
        shutil.copytree(saved.path, self.directory)
        self._redis.flushall()
        for key, (ttl_ms, value) in saved.keys.items():
            self._redis.restore(key, ttl_ms, value)

    def fingerprint(self) -> str:
        """Changes with each command of others to Redis and each change of a file."""
        self._num_asked += 1
        num_commands = self._redis.info("stats")["total_commands_processed"] - self._num_asked
        files = [
            (str(path), path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.directory.rglob("*")
        ]
        return f"{num_commands} {sorted(files)}"

    def live(self, watch: Watch | None = None) -> int:
        """One life of a learner; its exit code."""
        return run_forked(lambda: asyncio.run(live(self.directory, self.url, watch)))

    def result(self) -> dict[str, Any]:
        return json.loads((self.directory / "result.json").read_text())

    def close(self) -> None:
        self._redis.close()
        self._server.stop()


Point = tuple[str, int, int]
"""A file, a line of it, and which of its executions, from 1."""


class Count:
    """Which execution of its line a line event is."""

    def __init__(self) -> None:
        self._counts: Counter[Line] = Counter()

    def __call__(self, line: Line) -> Point:
        self._counts[line] += 1
        return (*line, self._counts[line])


def record(world: World) -> list[tuple[Point, str]]:
    """Every line that a life executes, in order, with the fingerprint of the world before it."""
    path = world.directory.parent / "lines.json"

    def live_and_tell() -> None:
        count, lines = Count(), list[tuple[Point, str]]()
        asyncio.run(
            live(
                world.directory,
                world.url,
                lambda line: lines.append((count(line), world.fingerprint())),
            )
        )
        path.write_text(json.dumps(lines))

    assert run_forked(live_and_tell) == 0
    return [
        ((file, number, execution), state)
        for (file, number, execution), state in json.loads(path.read_text())
    ]


def find_line(function: Callable[..., object], text: str) -> tuple[str, int]:
    """File and number of the first line of a function that holds `text`."""
    source, first = inspect.getsourcelines(function)
    number = first + next(i for i, line in enumerate(source) if text in line)
    return str(inspect.getsourcefile(function)), number


def prepare(world: World, directory: Path) -> dict[str, Saved]:
    """Beginnings: of the run; of a life with an open checkpoint; of one that lost an update."""
    assert run_forked(lambda: asyncio.run(fill(world.url))) == 0
    beginnings = {"new": world.save(directory / "new")}
    commit_line = find_line(Durability.write_checkpoint, "_bus.commit")
    assert world.live(lambda line: die() if line == commit_line else None) == KILLED
    beginnings["unacknowledged"] = world.save(directory / "unacknowledged")
    report_line = find_line(Learner._report, "num_buffered =")
    assert world.live(lambda line: die() if line == report_line else None) == KILLED
    beginnings["update lost"] = world.save(directory / "update-lost")
    return beginnings


def kill_and_resume(world: World, saved: Saved, point: Point, expected: dict[str, Any]) -> str:
    """What is wrong after a life that ended before `point` and one to the end; else empty."""
    world.load(saved)
    count = Count()
    code = world.live(lambda line: die() if count(line) == point else None)
    if code != KILLED:
        return f"the life was not killed there but ended with {code}"
    if code := world.live():
        return f"the next life ended with {code}"
    found = world.result()
    return "; ".join(
        f"{name} is {found[name]}, not {expected[name]}"
        for name in expected
        if found[name] != expected[name]
    )


def work(
    directory: Path, points: Sequence[tuple[str, Saved, Point]], expected: dict[str, Any]
) -> None:
    """Try some of the points in a world of their own, and leave what went wrong."""
    world = World(directory)
    wrong = []
    for name, saved, point in points:
        if fault := kill_and_resume(world, saved, point, expected):
            wrong.append(
                f"{name}, before {Path(point[0]).name}:{point[1]} (execution {point[2]}): {fault}"
            )
            print(wrong[-1], file=sys.stderr, flush=True)
    world.close()
    (directory / "wrong.json").write_text(json.dumps(wrong))


def main(directory: Path, mode: str) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    import_everything()
    world = World(directory / "world")
    beginnings = prepare(world, directory)
    world.load(beginnings["new"])
    assert world.live() == 0
    expected = world.result()
    points: list[tuple[str, Saved, Point]] = []
    counts, lines_seen = {}, set[Line]()
    for name, saved in beginnings.items():
        world.load(saved)
        events = record(world)
        assert world.result() == expected, name
        first_of_state = {state: point for point, state in reversed(events)}
        first_of_line = [
            point for point, _ in events if point[2] == 1 and point[:2] not in lines_seen
        ]
        lines_seen |= {point[:2] for point in first_of_line}
        chosen = first_of_line if mode == "every-line" else list(first_of_state.values())
        points += [(name, saved, point) for point in chosen]
        counts[name] = {"events": len(events), "states": len(first_of_state), "points": len(chosen)}
    world.close()
    wrong = share_work(directory, points, expected)
    print(
        json.dumps(
            {"counts": counts, "num_lines": len(lines_seen), "expected": expected, "wrong": wrong}
        )
    )


def share_work(
    directory: Path, points: Sequence[tuple[str, Saved, Point]], expected: dict[str, Any]
) -> list[str]:
    """Have every point tried by one of the workers; what went wrong."""
    paths = [directory / f"worker-{index}" for index in range(NUM_WORKERS)]
    pids = []
    for index, path in enumerate(paths):
        if not (pid := os.fork()):
            os._exit(run_forked(partial(work, path, points[index::NUM_WORKERS], expected)))
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        return [f"the workers ended with {codes}"]
    return [text for path in paths for text in json.loads((path / "wrong.json").read_text())]


def import_everything() -> None:
    """What each life would import and read anew.

    Nothing here starts a thread that a fork would lose.
    """
    torch.set_num_threads(1)
    _import_deepspeed(0, torch.device("cpu"))
    importlib.import_module("deepspeed.ops.op_builder.all_ops")
    load_causal_lm(CONFIG.model.path, CONFIG.model.dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
