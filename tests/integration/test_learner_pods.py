"""A learner over two pods, each a torchrun restarted when it ends, as by a kubelet."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.ledger import format_group_id
from sdar.bus.redis import RedisBus
from sdar.config import save_config
from sdar.contracts import codec
from sdar.contracts.streams import Stream
from sdar.process.ports import find_free_port
from services.learner.checkpoint import read_trained_groups
from tests.unit.learner.builders import RUN, count_pending, issue, make_config, read_account

ROOT = Path(__file__).parents[2]
HOSTS = ("127.0.0.1", "127.0.0.2")
"""Where each pod answers probes; the port is one, as in Kubernetes."""
START_S = 180.0
"""Two starts of torch and DeepSpeed on a busy machine, one against ranks about to end."""


class Pod:
    """One node of torchrun. `codes` tells how its lives ended."""

    def __init__(
        self, index: int, directory: Path, environment: dict[str, str], master_port: int
    ) -> None:
        self.index, self.codes = index, list[int]()
        self._log = directory / f"pod-{index}.log"
        self._environment = {
            **os.environ,
            **environment,
            "SDAR_HOST": HOSTS[index],
            "SDAR_INSTANCE": f"learner-{index}",
        }
        nodes = ("--nnodes=2", "--nproc-per-node=1", f"--node-rank={index}")
        meeting = ("--master-addr=127.0.0.1", f"--master-port={master_port}")
        bounds = ("--rdzv-conf=timeout=120", "--max-restarts=0", "--shutdown-timeout=60")
        self._command = (
            *(sys.executable, "-m", "torch.distributed.run"),
            *(*nodes, *meeting, *bounds),
            *("-m", "sdar.cli.main", "serve", "learner"),
        )
        self._is_deleted = False
        self._process: asyncio.subprocess.Process | None = None
        self._keeping = asyncio.create_task(self._keep())

    @property
    def text(self) -> str:
        return self._log.read_text(errors="replace")

    async def _keep(self) -> None:
        while not self._is_deleted:
            with self._log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    cwd=ROOT,
                    env=self._environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            self.codes.append(await self._process.wait())
            self._end_orphans()

    def _end_orphans(self) -> None:
        """A container takes all its processes along."""
        for process in self._list_ranks():
            process.kill()

    def _list_ranks(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_rank = (
                    "serve" in process.cmdline()[-2:]
                    and "torch.distributed.run" not in process.cmdline()
                )
                if (
                    is_rank
                    and process.environ().get("SDAR_PROBE_PORT")
                    == self._environment["SDAR_PROBE_PORT"]
                ):
                    found += (
                        [process]
                        if process.environ().get("SDAR_INSTANCE") == f"learner-{self.index}"
                        else []
                    )
        return found

    def kill(self) -> None:
        """As the kernel does with a container that has to go now."""
        self._process.kill()
        self._end_orphans()

    def stop(self) -> None:
        """As a kubelet does first."""
        self._process.send_signal(signal.SIGTERM)

    def delete(self) -> asyncio.Task[None]:
        self._is_deleted = True
        self.stop()
        return self._keeping

    async def close(self) -> None:
        self._is_deleted = True
        if not self._keeping.done():
            self.kill()
        await self._keeping


class Pods:
    def __init__(self, stack: AsyncExitStack, directory: Path) -> None:
        config = make_config(
            num_ranks=2, num_updates=5, max_staleness=100, checkpoint_every=2, keep_checkpoints=9
        )
        save_config(config, directory / "run.yaml")
        server = stack.enter_context(EmbeddedRedis(directory / "redis", fsync="always"))
        self.checkpoints = directory / "checkpoints"
        self.bus = RedisBus(server.url, RUN, config.stream_consumers)
        stack.push_async_callback(self.bus.close)
        self._probe_port = find_free_port(HOSTS[0])
        environment = {
            "SDAR_CONFIG": str(directory / "run.yaml"),
            "SDAR_REDIS_URL": server.url,
            "SDAR_WEIGHTS_URL": str(directory / "weights"),
            "SDAR_CHECKPOINTS": str(self.checkpoints),
            "SDAR_PROBE_PORT": str(self._probe_port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        master_port = find_free_port(HOSTS[0])
        self.pods = [Pod(index, directory, environment, master_port) for index in range(2)]
        for pod in self.pods:
            stack.push_async_callback(pod.close)

    async def reach(self, is_reached, what: str) -> None:
        """Until the awaitable condition holds."""
        try:
            async with asyncio.timeout(START_S):
                # Files, ports and processes offer no event for it.
                while not await is_reached():  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pytest.fail(
                "\n".join([f"Not reached: {what}", *(pod.text[-6000:] for pod in self.pods)])
            )

    async def all_ready(self) -> bool:
        return all(
            await asyncio.gather(*(asyncio.to_thread(self._is_ready, host) for host in HOSTS))
        )

    def _is_ready(self, host: str) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://{host}:{self._probe_port}/readyz", timeout=2
            ) as response:
                return response.status == 200
        except OSError:
            return False

    async def train(self, numbers, total: int) -> None:
        """Give two groups an update; until `total` updates are done in all, durable or not."""
        await issue(self.bus, numbers)
        await self.reach(lambda: self._has_policy(total), f"{total} updates")

    async def _has_policy(self, num_updates: int) -> bool:
        entry = await self.bus.newest(Stream.POLICY_UPDATES)
        return (
            entry is not None
            and codec.decode_weights_manifest(entry.payload).num_updates >= num_updates
        )

    async def has_trained(self, num_groups: int) -> bool:
        return (
            await count_pending(self.bus) == 0
            and (await self.bus.read_ledger()).num_trained == num_groups
        )

    def count_durable(self) -> int:
        return len(read_trained_groups(self.checkpoints))


async def test_a_learner_over_two_pods_killed_drained_and_deleted_loses_and_doubles_nothing(
    tmp_path,
):
    async with AsyncExitStack() as stack:
        learner = Pods(stack, tmp_path)
        leader, other = learner.pods
        await learner.reach(learner.all_ready, "every pod answers its probe")
        await learner.train(range(2), 1)

        # The other pod is killed with an unsaved update: both end, meet again and repeat it.
        assert learner.count_durable() == 0
        other.kill()
        await learner.reach(lambda: _is_over(leader, 1), "the leader ends")
        await learner.train(range(2, 4), 2)
        await learner.reach(lambda: learner.has_trained(4), "two updates are durable")

        # One pod is asked to leave, as in a rolling update: all drain, so nothing is repeated.
        await learner.train(range(4, 6), 3)
        assert learner.count_durable() == 2
        num_lives = len(leader.codes)
        other.stop()
        await learner.reach(lambda: _is_over(leader, num_lives + 1), "the leader ends")
        assert learner.count_durable() == 3
        assert "ranks were stopped" in leader.text

        # The leader is killed; then the run ends.
        await learner.reach(learner.all_ready, "all pods come back")
        leader.kill()
        await learner.train(range(6, 10), 5)
        await learner.reach(lambda: learner.has_trained(10), "the account is closed")
        assert await read_account(learner.bus) == {"issued": 10, "generated": 10, "trained": 10}
        trained = [
            group_id
            for group_ids in read_trained_groups(learner.checkpoints)
            for group_id in group_ids
        ]
        assert sorted(trained) == [format_group_id(number) for number in range(10)], "each once"

        # All are deleted at once: rank 0 needs the others to drain, well within the bound.
        async with asyncio.timeout(45):
            await asyncio.gather(*(pod.delete() for pod in learner.pods))


async def _is_over(pod: Pod, num_lives: int) -> bool:
    return len(pod.codes) >= num_lives
