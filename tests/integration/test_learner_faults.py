"""A learner with real DeepSpeed, Redis and files is killed anywhere or loses its Redis."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.bus.ledger import format_group_id
from sdar.bus.redis import RedisBus
from services.learner.checkpoint import read_trained_groups
from tests.integration import learner_faults
from tests.support import until
from tests.unit.learner.builders import RUN, count_pending, issue, read_account
from tests.unit.learner.rig import Rig

ROOT = Path(__file__).parents[2]
TRAINED = [
    ("group-00000000", "group-00000001"),
    ("group-00000006", "group-00000007"),
    ("group-00000003", "group-00000004"),
]
"""Two updates of old tokens before the fresh ones that had come before them."""


def try_points(directory, mode, timeout_s):
    """Kill lives of a learner in a process of its own, and check what they all came to."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", learner_faults.__name__, str(directory), mode],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads(finished.stdout.splitlines()[-1])
    assert report["wrong"] == []
    expected = report["expected"]
    assert [tuple(group_ids) for group_ids in expected["trained"]] == TRAINED
    assert expected["account"] == {
        "issued": 9,
        "generated": 9,
        "trained": 6,
        "stale": 1,
        "failed": 1,
        "cancelled": 1,
    }
    wanted = [format_group_id(number) for number in range(9)]
    assert [group_id for group_id, _ in expected["closed"]] == wanted
    assert expected["num_updates"] == 3
    assert expected["num_pending"] == 0
    assert len(expected["sha256"]) == 2
    return report


def test_a_learner_killed_between_any_two_lines_resumes_to_the_same_weights_bit_for_bit(
    tmp_path,
):
    """Every state of Redis and of the files that a life leads through is left behind once; what
    follows a state is the same whichever line left it. Weights, optimizer, groups of each update
    and account are those of a run without a fault."""
    report = try_points(tmp_path, "every-state", timeout_s=1800)
    assert set(report["counts"]) == {"new", "unacknowledged", "update lost"}
    for name, count in report["counts"].items():
        assert count["points"] == count["states"], name
        assert count["events"] > count["states"] > 25, name


@pytest.mark.slow
def test_a_learner_killed_before_every_line_of_its_step_resumes_to_the_same_weights_bit_for_bit(
    tmp_path,
):
    report = try_points(tmp_path, "every-line", timeout_s=7200)
    assert sum(count["points"] for count in report["counts"].values()) == report["num_lines"]
    assert report["num_lines"] > 400


@pytest.fixture
def server(tmp_path):
    with EmbeddedRedis(tmp_path / "redis", fsync="always") as server:
        yield server


def connect(rig, server):
    """The learner's bus, and the one of all others."""
    rig.bus = RedisBus(
        server.url,
        RUN,
        rig.config.stream_consumers,
        client_name="learner",
        on_blocked=rig.health.report_blocked,
    )
    return RedisBus(server.url, RUN, rig.config.stream_consumers)


async def test_an_outage_of_redis_is_waited_out_between_updates_and_in_the_middle_of_one(
    tmp_path, server
):
    rig = Rig(tmp_path)
    others = connect(rig, server)
    await issue(others, range(2))
    await rig.start()
    await rig.reach(1)
    server.stop()
    await until(lambda: rig.health.blocked, timeout_s=60)
    assert rig.health.is_alive
    server.start()
    await until(lambda: not rig.health.blocked, timeout_s=60)

    update = rig.trainer.update

    def update_without_server(*args, **kwargs):
        server.stop()
        return update(*args, **kwargs)

    rig.trainer.update = update_without_server
    await issue(others, range(2, 6))
    await until(lambda: rig.health.blocked, timeout_s=60)
    assert not rig.task.done()
    rig.trainer.update = update
    server.start()
    await until(lambda: rig.health.detail == "run finished" or rig.task.done(), timeout_s=60)
    await rig.stop()
    assert rig.health.blocked == ""
    assert await read_account(others) == {"issued": 6, "generated": 6, "trained": 6}
    assert await count_pending(others) == 0
    await rig.bus.close()
    await others.close()


async def test_a_run_goes_on_when_the_directory_of_redis_was_lost_between_two_lives(tmp_path):
    """Update 2 is durable, 3 is not, group 6 waited: the account closes, none trains twice."""
    rig = Rig(tmp_path, num_updates=4)
    with EmbeddedRedis(tmp_path / "redis") as server:
        others = connect(rig, server)
        await others.save_state("scheduler", b"cursor")
        await issue(others, range(7))
        await rig.start()
        await until(lambda: rig.learner.progress.num_updates >= 3 or rig.task.done(), timeout_s=60)
        await rig.kill()
        for bus in (rig.bus, others):
            await bus.close()
    shutil.rmtree(tmp_path / "redis")
    with EmbeddedRedis(tmp_path / "redis") as server:
        others = connect(rig, server)
        rig.health.is_ready = False
        await rig.start()
        await until(lambda: rig.health.is_ready or rig.task.done(), timeout_s=60)
        assert await others.load_state("scheduler") == b"cursor"
        assert await read_account(others) == {
            "issued": 7,
            "generated": 7,
            "trained": 4,
            "cancelled": 3,
        }
        await issue(others, range(7, 11), version=2)
        await until(lambda: rig.health.detail == "run finished" or rig.task.done(), timeout_s=60)
        await rig.stop()
        assert await read_account(others) == {
            "issued": 11,
            "generated": 11,
            "trained": 8,
            "cancelled": 3,
        }
        trained = [
            group_id for group_ids in read_trained_groups(rig.directory) for group_id in group_ids
        ]
        assert trained == [format_group_id(number) for number in (0, 1, 2, 3, 7, 8, 9, 10)]
        for bus in (rig.bus, others):
            await bus.close()
