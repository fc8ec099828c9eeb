"""What a change costs: each kind is made in a copy of the project, as a stranger would make it.

A change writes its files by hand and no others. Then `make docs` runs, the toy is put to use, and
the tests that hold for every one of its kind pass. The files are those that the table "What a
change costs" of docs/architecture.md names. Only a deployed service is not made: its row is
compared with the parts that tests/unit/test_roles.py asks of every service.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from sdar.config import EnvironmentConfig
from sdar.environments.registry import load_environment
from sdar.process.ports import find_free_port
from tests.integration.commands import run_sdar, server_process
from tests.unit.project_copy import ProjectCopy, read_costs
from tests.unit.test_roles import PARTS

METHODS = "sdar/contracts/methods.py"
ROLES = "sdar/contracts/roles.py"
METHOD_ROWS = "METHODS = index_by_name(\n    (\n"
START_TIMEOUT_S = 60.0
COSTS = read_costs()
PROOFS: dict[str, str] = {}

Test = Callable[..., object]


def proves(*changes: str) -> Callable[[Test], Test]:
    """The test makes these changes; the table has to name it."""

    def note(test: Test) -> Test:
        PROOFS.update(dict.fromkeys(changes, test.__name__))
        return test

    return note


def read_files(*changes: str) -> dict[str, frozenset[str]]:
    """The files that each change costs, as the page says."""
    return {change: COSTS[change].files for change in changes}


@pytest.fixture
def project(tmp_path: Path) -> ProjectCopy:
    return ProjectCopy(tmp_path / "project")


# ---- one file in a folder of its kind

GATE = """
from sdar.algorithms.gates import GATES

@GATES.register("toy")
def toy(inputs, sharpness):
    return (inputs.teacher_gap > 0).float()
"""
CORRECTION = """
import torch
from sdar.algorithms.corrections import CORRECTIONS, Weighing

@CORRECTIONS.register("toy")
def toy(scores, cap):
    weights = torch.where(scores.current == scores.behavior, 1.0, 0.5)
    return Weighing(scores.current, weights, weights, weights > 1)
"""
RETRIEVAL = """
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, RetrievalKind

@RETRIEVAL_KINDS.register("toy")
class ToyRetrieval(RetrievalKind):
    def choose(self, task, key):
        return self.sources.skill_library.specific[-1:]
"""
USE_SINGLE_FILES = """
from sdar.config import MethodConfig, TeacherConfig
from services.teacher.retrieval import Retriever
from tests.unit.algorithms.test_loss import four_tokens, loss_of
from tests.unit.teacher.builders import CLEAN, LIBRARY

def test_a_loss_is_trained_with_the_gate_and_the_correction():
    '''Gaps .5, -.5, 0 and 1.5; the last token alone is not as likely as when it was sampled.'''
    settings = MethodConfig(distillation_weight=1.0, kl_coefficient=0, gate="toy", off_policy="toy")
    _, gradient, _ = loss_of("sdar", four_tokens(), [-1.0, -2.0, -0.5, -2.5], settings)
    assert gradient == [-1.0 / 4, 0, 0, -0.5 / 4]

def test_skills_are_chosen():
    kind = TeacherConfig(retrieval="toy").retrieval
    chosen = Retriever(LIBRARY, kind=kind, num_skills=3).retrieve(CLEAN, "g0")
    assert chosen.skill_ids == ("general", "cool")
"""


@proves("gate", "correction", "retrieval kind")
def test_a_gate_a_correction_and_a_retrieval_kind_are_a_file_each(project: ProjectCopy) -> None:
    project.add("gate", "sdar/algorithms/gates/toy.py", GATE)
    project.add("correction", "sdar/algorithms/corrections/toy.py", CORRECTION)
    project.add("retrieval kind", "services/teacher/retrieval_kinds/toy.py", RETRIEVAL)
    project.test(
        USE_SINGLE_FILES,
        "tests/unit/test_registry.py",
        "tests/unit/algorithms/test_gates.py",
        "tests/unit/algorithms/test_corrections.py",
        "tests/unit/teacher/test_retrieval_kinds.py",
        "tests/unit/cli/test_configuration_page.py",
    )
    assert project.touched == read_files("gate", "correction", "retrieval kind")


# ---- what the row of a method names

TERM = """
from sdar.algorithms.distillation import compute_live_gap
from sdar.algorithms.terms import TERMS

@TERMS.register("toy")
def toy(inputs, settings):
    gap = compute_live_gap(inputs.policy_logprobs, inputs.teacher_gap)
    return 2 * gap, {"toy_gap": gap.abs()}
"""
MEASUREMENT = """
    TokenMeasurement("toy_gap", "nats", "Gap of the toy.", denominator="num_scored_tokens"),
"""
USE_TERM = """
from pytest import approx
from sdar.algorithms.loss import reduce_metrics
from sdar.config import MethodConfig
from services.learner.metrics import LEARNER
from tests.unit.algorithms.test_loss import four_tokens, loss_of

SETTINGS = MethodConfig(
    name="toy", distillation_weight=1.0, kl_coefficient=0.0, off_policy="none"
)

def test_a_loss_is_trained_with_the_term():
    batch = four_tokens(advantage=1.0)
    _, gradient, sums = loss_of("toy", batch, [-1.0, -2.0, -0.5, -3.0], SETTINGS)
    assert gradient == [(-1.0 - 2.0) / 4] * 4
    assert reduce_metrics(sums)["toy_gap"] == approx((0.5 + 0.5 + 0.0 + 2.0) / 4)
    assert LEARNER.reported["toy_gap"].name == "sdar_learner_toy_gap"

def test_the_run_is_wired_as_the_terms_facts_say():
    assert (SETTINGS.row.needs_teacher, SETTINGS.row.learns_without_advantage) == (True, True)
"""


SHAPING = """
from sdar.algorithms.shaping import SHAPINGS

@SHAPINGS.register("toy")
def toy(inputs, settings):
    return inputs.advantages + inputs.teacher_weight * inputs.teacher_gap
"""
REDUCER = """
from sdar.algorithms.reducers import REDUCERS

@REDUCERS.register("toy")
def toy(teacher_gap, is_scored, micro_batch):
    return teacher_gap.clamp(max=0.5)
"""
SCHEDULE = """
from sdar.algorithms.schedules import SCHEDULES

@SCHEDULES.register("toy")
def toy(update_index, settings):
    return 0.25
"""
OF_A_ROW = {
    "advantage shaping": ("shaping", SHAPING, ' shaping="toy",'),
    "gap reducer": ("reducers", REDUCER, ' reducer="toy",'),
    "schedule of lambda": ("schedules", SCHEDULE, ' schedule="toy",'),
}
PLAIN_ROW = """
        Method("toy", (*_GRPO, "toy")),
"""
ROW = """        Method("toy_row", (*_GRPO, "toy"),"""
USE_ROW = """
def test_a_loss_is_trained_as_a_row_says():
    '''A quarter of the gaps .5, -.5, 0 and 2, the last cut to .5, and of the term's gradient.'''
    batch = four_tokens(advantage=1.0)
    _, gradient, _ = loss_of("toy_row", batch, [-1.0, -2.0, -0.5, -3.0], SETTINGS)
    assert gradient == [(-1.0 - gap / 4 - 2.0 / 4) / 4 for gap in (0.5, -0.5, 0.0, 0.5)]
"""


@proves("loss term", *OF_A_ROW)
def test_what_the_table_of_methods_names_is_a_file_each_and_its_lines_there(
    project: ProjectCopy,
) -> None:
    change = "loss term"
    project.add(change, "sdar/algorithms/terms/toy.py", TERM)
    facts = '    "skill_sd": _DISTILLATION,\n'
    project.insert(change, METHODS, after=facts, text='    "toy": _DISTILLATION,\n')
    rows = f"{PLAIN_ROW}{ROW}),\n"
    project.insert(change, METHODS, after=METHOD_ROWS, text=rows)
    measurements = "sdar/algorithms/measurements.py"
    project.insert(change, measurements, after="TOKEN_MEASUREMENTS = (", text=MEASUREMENT)
    for change, (folder, text, words) in OF_A_ROW.items():
        project.add(change, f"sdar/algorithms/{folder}/toy.py", text)
        project.insert(change, METHODS, after=ROW, text=words)
    project.test(
        USE_TERM + USE_ROW,
        "tests/unit/test_methods_table.py",
        "tests/unit/algorithms/test_terms.py",
        "tests/unit/algorithms/test_measurements.py",
        "tests/unit/algorithms/test_teacher_consumers.py",
        "tests/unit/cli/test_configuration_page.py",
        "tests/unit/cli/test_metrics_page.py",
    )
    assert project.touched == read_files("loss term", *OF_A_ROW)


# ---- metric

METRIC = """
TOYS = ROLLOUT.declare(
    Counter("sdar_rollout_toys_total", "toys", "Toys thrown out.", key="num_toys")
)
"""
USE_METRIC = """
from pathlib import Path
import httpx
from sdar.process.telemetry import Health, ProbeServer, build_registry
from services.rollout.metrics import RolloutMetrics
from tests.unit.rollout.test_metrics import episode

def test_it_is_counted_shown_reported_and_on_the_page():
    metrics = RolloutMetrics(build_registry())
    metrics.observe_group([episode("heat", True), episode("cool", False)])
    server = ProbeServer("127.0.0.1", 0, Health(), metrics.registry)
    server.start()
    shown = httpx.get(f"http://127.0.0.1:{server.port}/metrics", trust_env=False).text
    server.stop()
    assert "sdar_rollout_toys_total 2.0" in shown.splitlines()
    assert metrics.collect_record(0, 0)["num_toys"] == 2
    row = "| `sdar_rollout_toys_total` | counter | toys | `num_toys` | Toys thrown out. |"
    assert row in Path("docs/metrics.md").read_text().splitlines()
"""


@proves("metric")
def test_a_metric_is_declared_once(project: ProjectCopy) -> None:
    path = "services/rollout/metrics.py"
    project.insert("metric", path, after="ROLLOUT = Declarations()\n", text=METRIC)
    project.insert(
        "metric",
        path,
        after='"""Count the episodes of a group that was played."""\n',
        text="        self.count(TOYS, len(trajectories))\n",
    )
    project.test(USE_METRIC, "tests/unit/cli/test_metrics_page.py")
    assert project.touched == read_files("metric")


# ---- environment

ENVIRONMENT = """
from sdar.environments import Environment, Observation, StepResult, Task, serve

class Coin(Environment):
    name = "toy"
    version = "1"
    splits = ("train",)
    max_turns = 1

    def __init__(self):
        self.tasks = {"train": [Task("toy", "train", "flip", "coin", "Say heads.", 0)]}

    def reset(self, task_id, seed):
        return Observation("Heads or tails?")

    def step(self, text):
        is_heads = text.strip() == "heads"
        said = Observation("So it is." if is_heads else "No.")
        return StepResult(
            said, float(is_heads), terminated=True, action=text.strip(), is_success=is_heads
        )

if __name__ == "__main__":
    serve(Coin, port=0, num_workers=1)
"""


@proves("environment of your own")
async def test_an_environment_of_ones_own_is_a_file_anywhere(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(ENVIRONMENT)
    async with server_process([sys.executable, "toy.py"], tmp_path) as server:
        ended = await run_sdar("env", "play", server.address, "--task", "flip", typed="heads\n")
    assert (ended.code, server.code) == (0, 0), ended.stderr
    assert "So it is." in ended.stdout
    # What a run names is the same file.
    chosen = EnvironmentConfig(name=f"{tmp_path / 'toy.py'}:Coin")
    assert load_environment(chosen.name, chosen.options).build().name == "toy"
    assert COSTS["environment of your own"].files == {"toy.py"}


USE_BUILT_IN = """
from sdar.environments.registry import load_environment

def test_it_is_found_by_its_name_and_played():
    toy = load_environment("toy").build()
    assert toy.reset("flip", 0).text == "Heads or tails?"
    assert toy.step("heads").is_success
"""


@proves("environment, built in")
def test_an_environment_that_is_built_in_is_its_file_its_name_and_its_line_on_the_page(
    project: ProjectCopy,
) -> None:
    change = "environment, built in"
    project.add(change, "services/envs/toy.py", ENVIRONMENT)
    project.insert(
        change,
        "sdar/environments/registry.py",
        after="BUILT_IN: dict[str, str] = {\n",
        text='    "toy": "services.envs.toy:Coin",\n',
    )
    project.insert(
        change,
        "docs/environments.md",
        after="`environment.options` in a run's configuration) |\n|---|---|---|\n",
        text="| `toy` | a coin; train | |\n",
    )
    project.test(
        USE_BUILT_IN, "tests/unit/environments/test_registry.py", "tests/unit/test_docs.py"
    )
    assert project.touched == read_files(change)


# ---- stream

USE_STREAM = """
import pytest
from sdar.bus.embedded_redis import EmbeddedRedis
from sdar.config import load_config
from sdar.connect import build_bus
from sdar.contracts import codec
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent
from sdar.in_process.memory_bus import MemoryBus
from sdar.process.settings import Settings
from services.gateway.describe import describe_letter
from tests.support import EXAMPLES

CONFIG = load_config(EXAMPLES / "household.yaml")
EVENT = LedgerEvent("household", "g0", GroupOutcome.ISSUED, 8, 0)

@pytest.fixture(params=["memory", "redis"])
async def bus(request, tmp_path):
    if request.param == "memory":
        yield MemoryBus(CONFIG.stream_consumers)
        return
    with EmbeddedRedis(tmp_path) as server:
        built = build_bus(CONFIG, Settings(redis_url=server.url))
        yield built
        await built.close()

async def test_entries_are_published_read_acknowledged_and_set_aside(bus):
    place = (Stream.TOY, ConsumerGroup.GATEWAY)
    await bus.publish(Stream.TOY, [codec.encode_ledger_event(EVENT)] * 2)
    read, broken = await bus.read(*place, "toy-0", 2)
    assert codec.decode_ledger_event(read.payload) == EVENT
    await bus.acknowledge([read])
    await bus.dead_letter(broken, "nobody can read it")
    lag = await bus.stream_lag(*place)
    assert (lag.num_undelivered, lag.num_pending) == (0, 0)
    [letter] = await bus.list_dead_letters()
    assert describe_letter(letter)["payload"]["group_id"] == "g0"
"""


@proves("stream")
def test_a_stream_is_a_name_a_reader_in_the_table_and_how_its_entries_are_shown(
    project: ProjectCopy,
) -> None:
    project.insert(
        "stream",
        "sdar/contracts/streams.py",
        after='    SCORED = "scored"\n',
        text='    TOY = "toy"\n',
    )
    gateway_reads = "reads=(Stream.LEDGER, Stream.EVALUATIONS"
    project.insert("stream", ROLES, after=gateway_reads, text=", Stream.TOY")
    project.insert(
        "stream",
        "services/gateway/describe.py",
        after="PAYLOADS: dict[Stream, Callable[[bytes], Any]] = {\n",
        text="    Stream.TOY: lambda data: dataclasses.asdict(codec.decode_ledger_event(data)),\n",
    )
    project.insert(
        "stream",
        "docs/architecture.md",
        after="| stream | from | to | payload |\n|---|---|---|---|\n",
        text="| `toy` | a tool | gateway | LedgerEvent |\n",
    )
    project.test(
        USE_STREAM,
        "tests/unit/test_roles.py",
        "tests/unit/test_docs.py",
        "tests/unit/test_architecture.py",
        "tests/unit/cli/test_metrics_page.py",
    )
    assert project.touched == read_files("stream")


# ---- service

SERVICE = """
from sdar.process.lifecycle import run_until_stopped
from sdar.process.telemetry import Health, serve_probes
from services.toy.metrics import BEATS, ToyMetrics

async def serve(config, settings):
    health = Health()

    async def wait(stopping):
        health.mark_ready()
        await stopping.wait()

    with serve_probes(settings.host, settings.probe_port, health) as registry:
        ToyMetrics(registry).count(BEATS)
        await run_until_stopped(wait)
"""
SERVICE_METRICS = """
from sdar.process.measurements import Counter, Declarations, Meters

TOY = Declarations()
BEATS = TOY.declare(Counter("sdar_toy_beats_total", "beats", "Beats of the toy."))

class ToyMetrics(Meters):
    def __init__(self, registry=None):
        super().__init__(TOY, registry)
"""
SERVICE_ROW = """
    RoleSpec(name=Role.TOY, listens=(Port.PROBE,), config_keys=("name",)),
"""
USE_SERVICE = """
from pathlib import Path
from sdar.cli.run import list_services
from sdar.config import load_config
from sdar.contracts.roles import ROLES, Role
from tests.support import EXAMPLES
from tests.unit.project_copy import read_costs
from tests.unit.test_roles import find_missing

def test_a_local_run_starts_it():
    assert list_services(load_config(EXAMPLES / "household.yaml"))[Role.TOY] == ["toy"]

def test_the_page_of_metrics_has_its_section():
    assert "\\n## `toy`\\n" in Path("docs/metrics.md").read_text()

def test_what_it_lacks_is_what_a_deployed_one_costs_besides():
    missing = {part.partition(":")[0] for part in find_missing(ROLES[Role.TOY])}
    assert missing
    assert missing <= read_costs()["service, deployed"].files
"""


@proves("service, as a process")
async def test_a_service_is_a_folder_and_a_row_of_the_table(project: ProjectCopy) -> None:
    change = "service, as a process"
    project.add(change, "services/toy/service.py", SERVICE)
    project.add(change, "services/toy/metrics.py", SERVICE_METRICS)
    learner = '    LEARNER = "learner"\n'
    project.insert(change, ROLES, after=learner, text='    TOY = "toy"\n')
    project.insert(change, ROLES, after="_ROWS = (", text=SERVICE_ROW)
    assert project.touched == read_files(change)
    await asyncio.to_thread(project.test, USE_SERVICE, "tests/unit/cli/test_metrics_page.py")
    port = find_free_port("127.0.0.1")
    command = [sys.executable, "-m", "sdar.cli.main", "serve", "toy"]
    variables = {"SDAR_CONFIG": "examples/household.yaml", "SDAR_PROBE_PORT": str(port)}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=project.root, env=project.environment(**variables), stderr=subprocess.PIPE
    )
    try:
        answers = await read_probes(f"http://127.0.0.1:{port}", process)
        process.send_signal(signal.SIGTERM)
        _, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, log.decode()
    assert answers["/healthz"] == answers["/readyz"] == "ready\n"
    assert "sdar_toy_beats_total 1.0" in answers["/metrics"].splitlines()


async def read_probes(url: str, process: asyncio.subprocess.Process) -> dict[str, str]:
    """The answers of a service's probes, once it is ready."""
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await is_ready(client):
                assert process.returncode is None
                await asyncio.sleep(0.05)
        paths = ("/healthz", "/readyz", "/metrics")
        return {path: (await client.get(path)).text for path in paths}


async def is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/readyz")).is_success
    except httpx.TransportError:
        return False


@proves("service, deployed")
def test_a_deployed_service_has_besides_each_part_that_the_test_of_roles_names() -> None:
    files = frozenset(part.partition(":")[0].format("toy") for part in PARTS)
    as_a_process = COSTS["service, as a process"].files
    assert as_a_process <= files
    assert COSTS["service, deployed"].files == files - as_a_process


def test_every_row_of_the_table_is_proven_by_the_test_that_it_names() -> None:
    assert {change: cost.proof for change, cost in COSTS.items()} == PROOFS
