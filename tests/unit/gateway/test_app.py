from __future__ import annotations

import base64
import dataclasses
import math
import re

import httpx
import pytest
from prometheus_client import CollectorRegistry

from sdar.contracts import codec
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import ChatMessage, GroupOutcome, MetricRecord, Trajectory
from services.gateway.app import build_app
from services.gateway.watch import Watch

from .fakes import build_config, play
from .test_scheduler import Run, begin

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
async def run():
    run = Run(build_config())
    yield run
    await run.stop()


@pytest.fixture
async def client(run: Run):
    watch = Watch(run.scheduler, run.bus, answer_s=30.0)  # however busy the machine is
    app = build_app(run.scheduler, watch, run.bus, registry=CollectorRegistry())
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://gateway"
    ) as client:
        yield client


async def test_readiness_waits_for_the_first_policy_but_health_does_not(
    run: Run, client: httpx.AsyncClient
) -> None:
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/readyz")).status_code == 503
    await begin(run)
    assert (await client.get("/readyz")).status_code == 200


async def test_run_status_shows_the_ledger_and_the_evaluations(
    run: Run, client: httpx.AsyncClient
) -> None:
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
    assert (await client.post("/v1/run/pause", params={"until_restart": True})).json()[
        "phase"
    ] == "paused"
    assert run.scheduler.state.paused_at_s == 0


async def test_an_environment_can_be_registered_while_running(
    run: Run, client: httpx.AsyncClient
) -> None:
    await begin(run)
    answer = await client.post("/v1/environments", json={"name": "other", "address": "there:7"})
    assert answer.status_code == 200
    listed = {
        item["name"]: item["address"] for item in (await client.get("/v1/environments")).json()
    }
    assert listed == {"fake": "here:1", "other": "there:7"}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "x", "address": "no port"},
        {"name": "", "address": "a:1"},
        {"name": "x", "address": "a:1", "y": 1},
    ],
)
async def test_nonsense_registrations_are_refused(
    client: httpx.AsyncClient, body: dict[str, object]
) -> None:
    assert (await client.post("/v1/environments", json=body)).status_code == 422


async def test_metrics_history_pages_from_a_cursor(run: Run, client: httpx.AsyncClient) -> None:
    records = [MetricRecord("test", "learner", "l", v, float(v), {"loss": v / 2}) for v in range(3)]
    await run.bus.publish(
        Stream.METRICS, [codec.encode_metric_record(record) for record in records]
    )
    await begin(run)
    first = (await client.get("/v1/metrics", params={"limit": 2})).json()
    rest = (await client.get("/v1/metrics", params={"after": first[-1]["entry_id"]})).json()
    assert [record["values"]["loss"] for record in first + rest] == [0.0, 0.5, 1.0]


async def test_a_trajectory_is_found_by_its_id_and_a_stranger_is_a_404(
    run: Run, client: httpx.AsyncClient
) -> None:
    _, training = await begin(run)
    trajectory = play(training[0], 0)
    await run.bus.publish(Stream.TRAJECTORIES, [codec.encode_trajectory(trajectory)])
    await run.scheduler.history.follow(run.bus)
    shown = (await client.get(f"/v1/trajectories/{trajectory.trajectory_id}")).json()
    assert shown["turns"][0]["response_token_ids"] == [3, 4]
    assert shown["turns"][0]["policy_versions"] == [0, 0]
    assert (await client.get("/v1/trajectories")).json() == [trajectory.trajectory_id]
    assert (await client.get("/v1/trajectories/nobody")).status_code == 404


async def test_a_value_that_is_not_finite_is_null_and_no_error(
    run: Run, client: httpx.AsyncClient
) -> None:
    record = MetricRecord(
        "test",
        "learner",
        "l",
        1,
        1.0,
        {"loss": math.nan, "gradient_norm": math.inf, "entropy": 0.5},
    )
    await run.bus.publish(Stream.METRICS, [codec.encode_metric_record(record)])
    await begin(run)
    values = (await client.get("/v1/metrics")).json()[0]["values"]
    assert values == {"loss": None, "gradient_norm": None, "entropy": 0.5}


def play_hostile(trajectory: Trajectory) -> Trajectory:
    turn = dataclasses.replace(
        trajectory.turns[0], messages=(ChatMessage("user", HOSTILE),), response_text=HOSTILE
    )
    return dataclasses.replace(trajectory, turns=(turn,))


async def test_markup_in_an_observation_stays_text_in_json(
    run: Run, client: httpx.AsyncClient
) -> None:
    _, training = await begin(run)
    trajectory = play_hostile(play(training[0], 0))
    await run.bus.publish(Stream.TRAJECTORIES, [codec.encode_trajectory(trajectory)])
    await run.scheduler.history.follow(run.bus)
    answer = await client.get(f"/v1/trajectories/{trajectory.trajectory_id}")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["turns"][0]["messages"][0]["content"] == HOSTILE


async def test_dead_letters_are_listed_in_pages_and_shown_with_their_payload(
    run: Run, client: httpx.AsyncClient
) -> None:
    _, training = await begin(run)
    payloads = [codec.encode_trajectory(play_hostile(play(training[0], 0))), b"\xff nonsense"]
    for payload in payloads:
        await run.set_aside(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, payload)
    newest = (await client.get("/v1/dead-letters", params={"limit": 1})).json()
    older = (await client.get("/v1/dead-letters", params={"before": newest[0]["letter_id"]})).json()
    assert [letter["size_bytes"] for letter in newest + older] == [
        len(payload) for payload in reversed(payloads)
    ]
    assert {(letter["reason"], letter["stream"], letter["group"]) for letter in newest + older} == {
        ("no good", "trajectories", "learner")
    }
    readable = (await client.get(f"/v1/dead-letters/{older[0]['letter_id']}")).json()
    assert readable["payload"]["turns"][0]["response_text"] == HOSTILE
    assert (readable["payload_error"], readable["payload_base64"]) == ("", "")
    unreadable = (await client.get(f"/v1/dead-letters/{newest[0]['letter_id']}")).json()
    assert unreadable["payload"] is None
    assert "trajectories" in unreadable["payload_error"]
    assert base64.b64decode(unreadable["payload_base64"]) == payloads[1]


async def test_a_retry_answers_with_the_new_group_and_a_second_one_finds_nothing(
    run: Run, client: httpx.AsyncClient
) -> None:
    _, training = await begin(run)
    payload = codec.encode_trajectory(play(training[0], 0))
    letter_id = await run.set_aside(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, payload)
    answer = await client.post(f"/v1/dead-letters/{letter_id}/retry")
    assert answer.json() == {"letter_id": letter_id, "group_id": "group-00000004"}
    assert (await client.post(f"/v1/dead-letters/{letter_id}/retry")).status_code == 404
    assert (await client.get(f"/v1/dead-letters/{letter_id}")).status_code == 404
    assert (await client.get("/v1/dead-letters")).json() == []


async def test_a_retry_of_what_cannot_be_read_is_a_409_that_says_why(
    run: Run, client: httpx.AsyncClient
) -> None:
    await begin(run)
    letter_id = await run.set_aside(Stream.TRAJECTORIES, ConsumerGroup.LEARNER, b"\xff nonsense")
    answer = await client.post(f"/v1/dead-letters/{letter_id}/retry")
    assert answer.status_code == 409
    assert "cannot be read" in answer.json()["error"]["message"]


@pytest.mark.parametrize("letter_id", ["nobody", "1", "1-2-3", "9" * 30 + "-0", "%2e%2e"])
async def test_what_is_no_letter_id_is_refused(client: httpx.AsyncClient, letter_id: str) -> None:
    assert (await client.get(f"/v1/dead-letters/{letter_id}")).status_code in (404, 422)
    assert (await client.post(f"/v1/dead-letters/{letter_id}/retry")).status_code in (404, 422)


async def test_failures_are_shown_with_their_reasons(run: Run, client: httpx.AsyncClient) -> None:
    _, training = await begin(run)
    await run.report(GroupOutcome.FAILED, training[0])
    await run.settle()
    assert (await client.get("/v1/run")).json()["failures"] == {training[0].group_id: "because"}


async def test_the_page_puts_what_it_is_given_into_text_and_never_into_markup(
    client: httpx.AsyncClient,
) -> None:
    page = (await client.get("/")).text
    assert "textContent" in page
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "DOMParser",
        "eval(",
        "setHTML",
        "srcdoc",
    ):
        assert way not in page


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "%2e%2e",
        "..%2f..%2fetc%2fpasswd",
        "%00",
        "%0d%0aSet-Cookie:%20a=b",
        "..%5c",
        "%ff",
        "%e2%80%ae",
        "a" * 5000,
        "/etc/passwd",
    ],
)
async def test_an_id_that_names_nothing_is_refused_and_names_no_file(
    client: httpx.AsyncClient, name: str
) -> None:
    for path in ("/v1/trajectories/", "/v1/dead-letters/"):
        url = httpx.URL(scheme="http", host="gateway", raw_path=f"{path}{name}".encode())
        answer = await client.get(url)
        assert answer.status_code in (404, 422), (path, answer.text)
        assert "set-cookie" not in answer.headers
        assert len(answer.text) < 12_000
        assert "root:" not in answer.text


async def test_the_page_runs_under_a_policy_that_lets_nothing_in_but_its_own_text(
    client: httpx.AsyncClient,
) -> None:
    answer = await client.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert (
        policy.count("'sha256-")
        == answer.text.count("<script>") + answer.text.count("<style>")
        == 2
    )
    assert "unsafe" not in policy
    # Neither has a hash: a policy without 'unsafe-inline' would leave them dead.
    assert not re.search(r"<[^>]+\s(on[a-z]+|style)=", answer.text)
    assert not re.search(r"(src|href)=.?(http|//)", answer.text)
    assert "location" not in answer.text  # a token never goes into an address


async def test_the_openapi_document_names_every_route(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {
        "/v1/run",
        "/v1/run/pause",
        "/v1/run/resume",
        "/v1/run/stop",
        "/v1/metrics",
        "/v1/environments",
    } <= paths.keys()
