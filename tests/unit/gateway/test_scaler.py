"""The scaler on a real scheduler and watch: what it does to a cluster and when it doesn't, how a
run sleeps and wakes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.errors import RefusedError, UnavailableError
from sdar.contracts.streams import Stream
from sdar.contracts.types import MetricRecord, TaskGroup
from sdar.in_process.memory_bus import MemoryBus
from services.gateway.app import build_app
from services.gateway.scaling import scaler as scaler_module
from services.gateway.scaling.file import ScalingFileReader
from services.gateway.scaling.governor import LOOKS_UP, SETTLE_S
from services.gateway.scaling.metrics import ScalingMetrics
from services.gateway.scaling.scaler import LOOK_S, Scaler
from services.gateway.state import RunPhase
from services.gateway.watch import Watch
from tests.support import until

from .fakes import Clock, FakeCluster, build_config
from .test_scheduler import Run, begin, finish

FILE = """
mode: gateway
dry_run: false
idle_after_s: 60
workloads:
  rollout: {kind: Deployment, name: rollout, min: 1, max: 4}
  teacher: {kind: Deployment, name: teacher, min: 1, max: 2}
  envs: {kind: Deployment, name: envs, min: 1, max: 2}
  learner: {kind: StatefulSet, name: learner, min: 1, max: 1}
"""
AWAKE = {"rollout": 1, "teacher": 1, "envs": 1, "learner": 1}
ASLEEP = {"rollout": 0, "teacher": 0, "envs": 1, "learner": 0}


class Bench:
    """A run with its watch and scaler. Time passes by `look` only."""

    def __init__(
        self,
        path: Path,
        config: RunConfig | None = None,
        bus: MemoryBus | None = None,
        cluster: FakeCluster | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.path = path
        self.clock = clock or Clock()
        self.cluster = cluster or FakeCluster(**AWAKE)
        self.registry = CollectorRegistry()
        self.run = Run(config or build_config(num_updates=9), bus, clock=self.clock)
        self.scheduler = self.run.scheduler
        self.watch = Watch(self.scheduler, self.run.bus, clock=self.clock)
        metrics = ScalingMetrics(self.registry)
        self.scaler = Scaler(
            self.scheduler,
            self.watch,
            ScalingFileReader(path),
            self.cluster,
            metrics,
            clock=self.clock,
        )

    def write(self, old: str = "", new: str = "") -> None:
        self.path.write_text(FILE.replace(old, new) if old else FILE)

    async def look(self, number: int = 1) -> None:
        await until(lambda: self.scheduler.is_restored)
        for _ in range(number):
            self.clock.now_s += LOOK_S
            await self.watch.refresh()
            await self.scaler.look()

    async def report(self, service: str, instance: str, **values: float) -> None:
        record = MetricRecord("test", service, instance, 0, self.clock(), values)
        await self.run.bus.publish(Stream.METRICS, [codec.encode_metric_record(record)])

    async def look_while_the_learner_waits(self, number: int) -> None:
        for _ in range(number):
            await self.report("learner", "l", wait_share=0.6, total_s=5.0)
            for index in range(self.cluster.sizes["rollout"]):
                await self.report("rollout", f"r{index}", waiting_share=0.0, running_episodes=2.0)
            await self.scheduler.history.follow(self.run.bus)
            await self.look()

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    async def status(self, path: str) -> dict[str, Any]:
        app = build_app(
            self.scheduler, self.watch, self.run.bus, scaler=self.scaler, registry=self.registry
        )
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://gateway"
        ) as client:
            return (await client.get(path)).json()  # type: ignore[no-any-return]

    async def stop(self) -> None:
        await self.run.settle()
        await self.run.stop()

    async def restart(self, **changes: Any) -> Bench:
        """The next gateway of the same run, in the same cluster."""
        await self.stop()
        arguments = {
            "config": self.run.config,
            "bus": self.run.bus,
            "cluster": self.cluster,
            "clock": self.clock,
        } | changes
        return Bench(self.path, **arguments)


@pytest.fixture
async def bench(tmp_path: Path):
    bench = Bench(tmp_path / "scaling.yaml")
    bench.write()
    yield bench
    if not bench.run.task.done():
        await bench.run.stop()


async def start(bench: Bench) -> list[TaskGroup]:
    """Begin the run; the gateway knows of all that it has issued. Returns the first training
    groups.
    """
    _, training = await begin(bench.run)
    await until(lambda: bench.scheduler.ledger.num_issued == len(training))
    await bench.watch.refresh()
    return training


async def fall_asleep_paused(bench: Bench) -> None:
    await start(bench)
    bench.scheduler.control.pause()
    await bench.look(1 + int(60 / LOOK_S))
    assert bench.cluster.sizes == ASLEEP


async def test_a_starved_learner_gets_another_rollout_worker_once_the_looks_agree(
    bench: Bench,
) -> None:
    await start(bench)
    await bench.look_while_the_learner_waits(int(SETTLE_S / LOOK_S) - 1)
    assert bench.cluster.sizes == AWAKE
    await bench.look_while_the_learner_waits(LOOKS_UP)
    assert bench.cluster.sizes == AWAKE | {"rollout": 2}
    assert [(name, reason) for name, reason, _ in bench.cluster.events] == [("rollout", "ScaledUp")]
    assert bench.sample("sdar_scaling_changes_total", workload="rollout", direction="up") == 1
    status = await bench.status("/v1/scaling")
    assert (status["mode"], status["problem"], status["changes"][0]["after"]) == ("gateway", "", 2)
    assert "The learner waits 60%" in status["changes"][0]["reason"]


async def test_a_worker_that_was_asked_for_is_waited_for_before_the_next(bench: Bench) -> None:
    await start(bench)
    while bench.cluster.sizes["rollout"] == 1:
        await bench.look_while_the_learner_waits(1)
    for _ in range(40):  # the second one never reports
        await bench.report("learner", "l", wait_share=0.6, total_s=5.0)
        await bench.report("rollout", "r0", waiting_share=0.0)
        await bench.scheduler.history.follow(bench.run.bus)
        await bench.look()
    assert bench.cluster.sizes["rollout"] == 2
    await bench.look_while_the_learner_waits(20)
    assert bench.cluster.sizes["rollout"] == 4


async def test_what_a_learner_said_before_it_went_away_is_no_signal(bench: Bench) -> None:
    await start(bench)
    bench.cluster.set("rollout", 3)
    for number in range(80):
        if number < 14:
            await bench.report("learner", "l", wait_share=0.0, total_s=5.0)
        for index in range(3):
            await bench.report("rollout", f"r{index}", waiting_share=0.0 if number < 14 else 1.0)
        await bench.scheduler.history.follow(bench.run.bus)
        await bench.look()
    assert bench.cluster.sizes["rollout"] == 3
    assert "0 updates" in bench.scaler.workloads["rollout"].reason


async def test_a_dry_run_explains_itself_and_touches_nothing(bench: Bench) -> None:
    bench.write("dry_run: false", "dry_run: true")
    await start(bench)
    await bench.look_while_the_learner_waits(20)
    rollout = (await bench.status("/v1/scaling"))["workloads"]["rollout"]
    assert (rollout["current"], rollout["wanted"]) == (1, 2)
    assert "more of them are needed" in rollout["reason"]
    bench.scheduler.control.pause()
    await bench.look(20)
    rollout = (await bench.status("/v1/scaling"))["workloads"]["rollout"]
    assert (rollout["wanted"], "paused" in rollout["reason"]) == (0, True)
    assert (bench.cluster.sizes, bench.cluster.events, bench.scheduler.state.sleep) == (
        AWAKE,
        [],
        None,
    )


async def test_changed_bounds_are_kept_at_the_next_look_without_a_restart(bench: Bench) -> None:
    await bench.look()
    bench.write("name: rollout, min: 1, max: 4", "name: rollout, min: 3, max: 4")
    await bench.look()
    assert bench.cluster.sizes["rollout"] == 3
    bench.write("name: rollout, min: 1, max: 4", "name: rollout, min: 1, max: 2")
    await bench.look()
    assert bench.cluster.sizes["rollout"] == 2


async def test_a_broken_file_raises_an_alarm_and_the_last_good_one_stays_in_force(
    bench: Bench,
) -> None:
    await bench.look()
    bench.write("workloads:", "workload:")
    bench.cluster.set("rollout", 9)
    await bench.look(2)
    assert bench.cluster.sizes["rollout"] == 4
    status = await bench.status("/v1/run")
    assert [alarm["name"] for alarm in status["alarms"]] == ["scaling"]
    assert "workload" in status["alarms"][0]["message"]
    assert bench.sample("sdar_scaling_errors_total", cause="file") == 1
    bench.write()
    await bench.look(2)
    assert (await bench.status("/v1/run"))["alarms"] == []


async def test_beside_keda_only_the_learner_is_touched(bench: Bench) -> None:
    bench.write("mode: gateway", "mode: keda")
    bench.cluster.set("rollout", 9)
    await fall_asleep_learner_only(bench)
    assert bench.cluster.sizes == AWAKE | {"rollout": 9, "learner": 0}


async def fall_asleep_learner_only(bench: Bench) -> None:
    await start(bench)
    bench.scheduler.control.pause()
    await bench.look(1 + int(60 / LOOK_S))


# ---- whose hands are off


async def test_an_api_server_that_is_away_harms_nothing_and_is_an_alarm_when_it_lasts(
    bench: Bench,
) -> None:
    await start(bench)
    bench.cluster.fault = UnavailableError("The API server cannot be reached.")
    await bench.look(2)
    assert (await bench.status("/v1/run"))["alarms"] == []
    assert "cannot be reached" in (await bench.status("/v1/scaling"))["problem"]
    await bench.look(2)
    status = await bench.status("/v1/run")
    assert (status["phase"], [alarm["name"] for alarm in status["alarms"]]) == (
        "running",
        ["scaling"],
    )
    bench.cluster.fault = None
    bench.cluster.set("rollout", 0)
    await bench.look(2)
    assert bench.cluster.sizes == AWAKE
    assert (await bench.status("/v1/run"))["alarms"] == []


async def test_a_defect_of_the_scaler_is_an_alarm_and_not_the_end_of_the_run(bench: Bench) -> None:
    await start(bench)
    bench.cluster.fault = ValueError("no JSON")
    await bench.look(4)
    status = await bench.status("/v1/run")
    assert (status["phase"], [alarm["name"] for alarm in status["alarms"]]) == (
        "running",
        ["scaling"],
    )
    assert "no JSON" in status["alarms"][0]["message"]


async def test_a_workload_that_is_not_there_keeps_the_others_from_nothing(bench: Bench) -> None:
    del bench.cluster.sizes["teacher"]
    await start(bench)
    bench.scheduler.control.pause()
    await bench.look(14)
    assert bench.cluster.sizes == {"rollout": 0, "envs": 1, "learner": 0}


async def test_who_acts_at_the_same_time_is_not_overridden(bench: Bench) -> None:
    await bench.look()
    bench.cluster.set("rollout", 9)
    bench.cluster.before_resize = lambda: bench.cluster.set("rollout", 3)
    await bench.look()
    assert bench.cluster.sizes["rollout"] == 3
    assert bench.sample("sdar_scaling_errors_total", cause="conflict") == 1


async def test_a_status_that_changed_meanwhile_is_nobodys_decision(bench: Bench) -> None:
    await bench.look()
    bench.cluster.set("rollout", 9)
    changes = iter([9])
    bench.cluster.before_resize = lambda: [
        bench.cluster.set("rollout", size) for size in changes
    ].clear()
    await bench.look()
    assert bench.cluster.sizes["rollout"] == 4
    assert bench.sample("sdar_scaling_errors_total", cause="conflict") == 0


async def test_a_superseded_gateway_changes_no_size(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaler_module, "_CONFIRM_S", 0.5)
    await start(bench)
    await bench.look()
    successor = Run(build_config(num_updates=9), bench.run.bus)
    await successor.reach(RunPhase.RUNNING)
    bench.cluster.set("rollout", 9)
    await bench.look()
    assert bench.cluster.sizes["rollout"] == 9
    assert bench.run.task.done()
    with pytest.raises(Exception, match="taken over the role of gateway"):
        await bench.run.task
    await successor.settle()
    await successor.stop()


async def test_before_redis_holds_anything_the_bounds_are_kept_already(bench: Bench) -> None:
    bench.write("name: rollout, min: 1, max: 4", "name: rollout, min: 2, max: 4")
    await bench.look()
    assert (bench.scheduler.state.phase, bench.cluster.sizes["rollout"]) == (RunPhase.STARTING, 2)
    assert bench.scheduler.is_blank


# ---- sleep


async def test_a_paused_run_sleeps_tells_of_it_and_wakes_to_its_former_sizes(bench: Bench) -> None:
    bench.cluster.set("rollout", 3)
    await fall_asleep_paused(bench)
    assert [(name, reason) for name, reason, _ in bench.cluster.events] == [
        ("rollout", "Asleep"),
        ("teacher", "Asleep"),
        ("learner", "Asleep"),
    ]
    status = await bench.status("/v1/run")
    assert (status["phase"], "paused" in status["sleep"]["reason"]) == ("paused", True)
    assert bench.sample("sdar_idle") == 1
    await bench.look(400)
    assert (bench.cluster.sizes, (await bench.status("/v1/run"))["alarms"]) == (ASLEEP, [])
    bench.scheduler.control.resume()
    await bench.look()
    assert bench.cluster.sizes == AWAKE | {"rollout": 3}
    assert {reason for _, reason, _ in bench.cluster.events[3:]} == {"Awake"}
    status = await bench.status("/v1/run")
    assert (status["phase"], status["sleep"], bench.sample("sdar_idle")) == ("running", None, 0)


async def test_a_woken_run_has_as_long_as_a_new_one_until_it_is_missed_or_stuck(
    bench: Bench,
) -> None:
    await fall_asleep_paused(bench)
    await bench.look(500)
    bench.scheduler.control.resume()
    await bench.look(int(300 / LOOK_S))
    assert (await bench.status("/v1/run"))["alarms"] == []
    assert bench.cluster.sizes == AWAKE
    await bench.look(int(600 / LOOK_S))  # nobody came: stuck
    assert bench.cluster.sizes == ASLEEP
    assert "stuck" in (await bench.status("/v1/run"))["sleep"]["reason"]


async def test_a_finished_run_sleeps_and_cannot_be_woken_for_nothing(
    bench: Bench, tmp_path: Path
) -> None:
    short = await bench.restart(config=build_config(num_updates=2), bus=None)
    await finish(short.run)
    await short.look(14)
    assert short.cluster.sizes == ASLEEP
    with pytest.raises(RefusedError, match="finished"):
        short.scheduler.control.resume()
    again = await short.restart()
    await again.look(20)
    assert (again.cluster.sizes, again.scheduler.state.phase) == (ASLEEP, RunPhase.FINISHED)
    longer = await again.restart(config=build_config(num_updates=3))
    await longer.look()
    assert longer.cluster.sizes == AWAKE
    await longer.run.take(1)
    await longer.stop()


async def test_a_run_that_sleeps_because_it_was_paused_outlives_its_gateway_asleep_and_paused(
    bench: Bench,
) -> None:
    bench.cluster.set("rollout", 2)
    await fall_asleep_paused(bench)
    again = await bench.restart(
        config=build_config(num_updates=10)
    )  # another configuration doesn't end a pause
    await again.look(3)
    await again.run.reach(RunPhase.PAUSED)
    assert again.cluster.sizes == ASLEEP
    again.scheduler.control.resume()
    await again.look()
    assert again.cluster.sizes == AWAKE | {"rollout": 2}
    await again.stop()


async def test_a_stuck_run_sleeps_on_after_a_restart_and_wakes_under_another_configuration(
    bench: Bench,
) -> None:
    await start(bench)
    await bench.look(int(660 / LOOK_S))
    assert (bench.cluster.sizes, bench.scheduler.state.phase) == (ASLEEP, RunPhase.RUNNING)
    again = await bench.restart()
    await again.look(3)
    assert again.cluster.sizes == ASLEEP
    changed = await again.restart(config=build_config(num_updates=9, max_staleness=2))
    await changed.look()
    assert changed.cluster.sizes == AWAKE
    await changed.stop()


async def test_a_gateway_that_was_suspended_itself_takes_no_run_for_stuck(bench: Bench) -> None:
    await start(bench)
    await bench.look()
    bench.clock.now_s += 7200
    await bench.look(int(590 / LOOK_S))
    assert bench.cluster.sizes == AWAKE
    await bench.look(int(60 / LOOK_S))
    assert bench.cluster.sizes == ASLEEP


async def test_nothing_is_issued_lost_or_failed_by_sleeping(bench: Bench) -> None:
    training = await start(bench)
    before = bench.scheduler.ledger.counts()
    bench.scheduler.control.pause()
    await bench.look(30)
    bench.scheduler.control.resume()
    await bench.look(3)
    assert bench.scheduler.ledger.counts() == before
    assert await bench.run.num_waiting() == 0
    assert len(training) == before["running"]


async def test_a_stop_wakes_a_sleeping_run_for_its_last_evaluation(bench: Bench) -> None:
    await fall_asleep_paused(bench)
    bench.scheduler.control.stop()
    await bench.look()
    assert bench.cluster.sizes == AWAKE
    assert bench.scheduler.state.phase is RunPhase.STOPPING


async def test_a_sleeping_run_that_lost_its_redis_sleeps_on_until_somebody_wakes_it(
    bench: Bench,
) -> None:
    await fall_asleep_paused(bench)
    again = await bench.restart(bus=None)
    await again.look(5)
    assert again.cluster.sizes == ASLEEP
    assert "no memory" in (await again.status("/v1/run"))["sleep"]["reason"]
    again.scheduler.control.resume()
    await again.look()
    assert again.cluster.sizes == AWAKE
    await again.stop()


async def test_a_learner_that_could_not_be_seen_at_first_is_not_woken_by_that(bench: Bench) -> None:
    await fall_asleep_paused(bench)
    again = await bench.restart(bus=None)
    again.cluster.fault = UnavailableError("The API server is away.")
    await again.look(2)
    again.cluster.fault = None
    await again.look(2)
    assert again.cluster.sizes == ASLEEP
    await again.stop()


async def test_where_nobody_holds_it_asleep_any_more_a_run_is_awake(bench: Bench) -> None:
    await fall_asleep_paused(bench)
    await bench.stop()
    unscaled = Run(bench.run.config, bench.run.bus, clock=bench.clock, is_scaled=False)
    await until(lambda: unscaled.scheduler.is_restored)
    assert unscaled.scheduler.state.sleep is None
    assert unscaled.scheduler.state.paused_at_s, "awake, and paused as before"
    await unscaled.stop()


async def test_a_gateway_that_died_between_its_decision_and_its_deed_puts_to_sleep_what_it_noted(
    bench: Bench,
) -> None:
    await start(bench)
    bench.scheduler.control.pause()
    await bench.look()
    bench.scheduler.control.fall_asleep("The run is paused.", {"rollout": 1})
    await bench.scheduler.confirm_tenure()
    again = await bench.restart()
    await again.look()
    assert again.cluster.sizes == ASLEEP
    await again.stop()


async def test_where_nothing_is_scaled_the_api_says_so(bench: Bench) -> None:
    app = build_app(bench.scheduler, bench.watch, bench.run.bus, registry=CollectorRegistry())
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://gateway"
    ) as client:
        status = (await client.get("/v1/scaling")).json()
    assert (status["mode"], status["workloads"], status["sleep"]) == ("off", {}, None)
