from __future__ import annotations

import httpx
import pytest
from prometheus_client import CollectorRegistry

from sdar.contracts import codec
from sdar.contracts.streams import Stream
from sdar.contracts.types import MetricRecord
from services.gateway.app import build_app

from .fakes import build_config, play
from .test_scheduler import Run, begin


@pytest.fixture
async def run():
    run = Run(build_config())
    yield run
    await run.stop()


@pytest.fixture
async def client(run: Run):
    app = build_app(run.scheduler, run.bus, registry=CollectorRegistry())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


async def test_readiness_waits_for_the_first_policy_but_health_does_not(run: Run, client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/readyz")).status_code == 503
    await begin(run)
    assert (await client.get("/readyz")).status_code == 200


async def test_run_status_shows_the_ledger_and_the_evaluations(run: Run, client: httpx.AsyncClient) -> None:
    before, _ = await begin(run)
    await run.answer_evaluations(before, 0)
    await run.settle()
    status = (await client.get("/v1/run")).json()
    assert status["phase"] == "running"
    assert status["ledger"]["issued"] == status["ledger"]["running"] == 4
    assert status["ledger_gap"] == 0
    assert [evaluation["success"] for evaluation in status["evaluations"]] == [1.0, 1.0]


async def test_a_refused_control_is_a_409_that_says_why(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/run/resume")
    assert answer.status_code == 409
    assert "starting" in answer.json()["error"]["message"]


async def test_pause_and_resume_over_http(run: Run, client: httpx.AsyncClient) -> None:
    await begin(run)
    assert (await client.post("/v1/run/pause")).json()["phase"] == "paused"
    assert (await client.post("/v1/run/resume")).json()["phase"] == "running"


async def test_an_environment_can_be_registered_while_running(run: Run, client: httpx.AsyncClient) -> None:
    await begin(run)
    answer = await client.post("/v1/environments", json={"name": "other", "address": "there:7"})
    assert answer.status_code == 200
    listed = {item["name"]: item["address"] for item in (await client.get("/v1/environments")).json()}
    assert listed == {"fake": "here:1", "other": "there:7"}


@pytest.mark.parametrize(
    "body", [{}, {"name": "x", "address": "no port"}, {"name": "", "address": "a:1"}, {"name": "x", "address": "a:1", "y": 1}]
)
async def test_nonsense_registrations_are_refused(client: httpx.AsyncClient, body: dict[str, object]) -> None:
    assert (await client.post("/v1/environments", json=body)).status_code == 422


async def test_metrics_history_pages_from_a_cursor(run: Run, client: httpx.AsyncClient) -> None:
    records = [MetricRecord("test", "learner", "l", v, float(v), {"loss": v / 2}) for v in range(3)]
    await run.bus.publish(Stream.METRICS, [codec.encode_metric_record(record) for record in records])
    await begin(run)
    first = (await client.get("/v1/metrics", params={"limit": 2})).json()
    rest = (await client.get("/v1/metrics", params={"after": first[-1]["entry_id"]})).json()
    assert [record["values"]["loss"] for record in first + rest] == [0.0, 0.5, 1.0]


async def test_a_trajectory_is_found_by_its_id_and_a_stranger_is_a_404(run: Run, client: httpx.AsyncClient) -> None:
    _, training = await begin(run)
    trajectory = play(training[0], 0)
    await run.bus.publish(Stream.TRAJECTORIES, [codec.encode_trajectory(trajectory)])
    await run.scheduler.history.follow(run.bus)
    shown = (await client.get(f"/v1/trajectories/{trajectory.trajectory_id}")).json()
    assert shown["turns"][0]["response_token_ids"] == [3, 4]
    assert shown["turns"][0]["policy_versions"] == [0, 0]
    assert (await client.get("/v1/trajectories")).json() == [trajectory.trajectory_id]
    assert (await client.get("/v1/trajectories/nobody")).status_code == 404


async def test_the_openapi_document_names_every_route(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/v1/run", "/v1/run/pause", "/v1/run/resume", "/v1/run/stop", "/v1/metrics", "/v1/environments"} <= paths.keys()
