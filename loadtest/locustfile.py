"""The load test's users: people and dashboards over HTTP, rollout slots at the environments' gRPC.

    locust -f loadtest/locustfile.py GatewayUser --host https://GATEWAY:PORT
    locust -f loadtest/locustfile.py EnvironmentUser --host HOST:PORT

They speak the wire only; token and certificates are those of any client of ours (`SDAR_TOKEN`,
`SDAR_TLS_*`). No call is made twice: what fails is counted, a failure over gRPC by the name of its
status.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from typing import Any, ClassVar
from urllib.parse import quote

from locust import (  # before all else that opens sockets: it patches them for gevent
    FastHttpUser,
    User,
    between,
    constant,
    task,
)

# isort: split
import gevent
import grpc
import grpc.experimental.gevent as grpc_gevent
from gevent.lock import BoundedSemaphore

from sdar.process.settings import load_settings
from sdar.v1 import environment_pb2, environment_pb2_grpc
from sdar.wire.security import Security

grpc_gevent.init_gevent()

SEED = int(os.environ.get("LOADTEST_SEED", "0"))
ENVIRONMENT = os.environ.get("LOADTEST_ENVIRONMENT", "household")
_PACE = float(os.environ.get("LOADTEST_PACE", "1"))
"""Share of these times that users take: less for a test of the users themselves."""
REFRESH_S = 2.0 * _PACE
"""How long the gateway's page rests."""
TURN_S = 1.0 * _PACE
"""How long a model takes for a turn while it plays many episodes, on average."""
TIMEOUT_S = 10.0
USERS_PER_CHANNEL = 32
"""A rollout worker plays many episodes over one connection."""

_SETTINGS = load_settings()
_SECURITY = Security.from_settings(_SETTINGS)
_TOKEN = _SECURITY.token_to_present()
_AUTHORIZATION = f"Bearer {_TOKEN}"
_users = itertools.count()
random.seed(SEED)  # of what Locust draws: pauses, tasks


class GatewayUser(FastHttpUser):
    """Somebody with the page open who reads an episode; one in twenty scrapes for Prometheus."""

    host = _SETTINGS.gateway_url or "http://127.0.0.1:8080"
    wait_time = constant(REFRESH_S)
    network_timeout = connection_timeout = TIMEOUT_S
    insecure = False
    ssl_context_factory = (
        None if _SECURITY.tls is None else staticmethod(_SECURITY.tls.build_client_context)
    )
    default_headers = {"Authorization": _AUTHORIZATION} if _TOKEN else {}

    def on_start(self) -> None:
        self._random = random.Random(f"{SEED}/{next(_users)}")
        self._seen: list[str] = []
        # Locust starts users in bursts.
        gevent.sleep(self._random.uniform(0, REFRESH_S))
        self.open_page()

    @task(1)
    def open_page(self) -> None:
        """Everything from its beginning."""
        self._after = "0-0"
        self.client.get("/")
        self.client.get("/v1/environments")
        self.refresh()

    @task(15)
    def refresh(self) -> None:
        """What the page does."""
        self.client.get("/v1/run")
        records = self._ask(f"/v1/metrics?after={self._after}&limit=5000", "/v1/metrics")
        if records:
            self._after = records[-1]["entry_id"]
        self._seen = self._ask("/v1/trajectories?limit=12", "/v1/trajectories")

    @task(3)
    def read_trajectory(self) -> None:
        if self._seen:
            chosen = quote(self._random.choice(self._seen), safe="")
            self.client.get(f"/v1/trajectories/{chosen}", name="/v1/trajectories/ID")

    @task(1)
    def scrape(self) -> None:
        self.client.get("/metrics")

    def _ask(self, path: str, name: str) -> list[Any]:
        """The list that is answered; empty for a failure, which is counted."""
        response = self.client.get(path, name=name)
        if response.status_code != 200:
            return []
        return list(response.json())


class RpcFailure(Exception):
    """Its text is the name of the status, so that failures of one kind are counted together."""


class EnvironmentUser(User):
    """A place for one episode of a rollout worker: plays a task to its end, then the next one.

    Its moves are random.
    """

    host = _SETTINGS.envs_address
    wait_time = between(0.5 * TURN_S, 1.5 * TURN_S)
    _channels: ClassVar[dict[int, grpc.Channel]] = {}
    _task_ids: ClassVar[list[str]] = []
    _listing: ClassVar = BoundedSemaphore()
    """The first user asks for the tasks, the others wait for them."""

    def on_start(self) -> None:
        number = next(_users)
        self._random = random.Random(f"{SEED}/{number}")
        self._session_id = ""
        channel = self._connect(number // USERS_PER_CHANNEL)
        self._stub = environment_pb2_grpc.EnvironmentServiceStub(channel)
        # Locust starts users in bursts.
        gevent.sleep(self._random.uniform(0, TURN_S))

    def on_stop(self) -> None:
        self._close()

    @task
    def play_episode(self) -> None:
        with self._listing:
            if not self._task_ids and not self._list_tasks():
                return
        task_id = self._random.choice(self._task_ids)
        request = environment_pb2.OpenSessionRequest(
            environment=ENVIRONMENT, task_id=task_id, seed=self._random.getrandbits(31)
        )
        state = self._call("OpenSession", request)
        if state is None:
            return

        self._session_id = state.session_id
        for index in itertools.count():
            self.wait()
            text = self._random.choice(state.admissible_actions or ("look",))
            step = environment_pb2.StepRequest(
                session_id=self._session_id, step_index=index, text=text
            )
            state = self._call("Step", step)
            if state is None or state.terminated or state.truncated:
                break
        self._close()

    def _list_tasks(self) -> bool:
        described = self._call("Describe", environment_pb2.DescribeRequest(environment=ENVIRONMENT))
        if described is None:
            return False
        split = described.environments[0].splits[0].name
        request = environment_pb2.ListTasksRequest(
            environment=ENVIRONMENT, split=split, page_size=500
        )
        listed = self._call("ListTasks", request)
        if listed is not None:
            self._task_ids.extend(one.task_id for one in listed.tasks)
        return bool(self._task_ids)

    def _close(self) -> None:
        if self._session_id:
            request = environment_pb2.CloseSessionRequest(session_id=self._session_id)
            # Forgotten first: a user that is stopped during the call does not close twice.
            self._session_id = ""
            self._call("CloseSession", request)

    def _call(self, method: str, request: Any) -> Any:
        """The answer; None for a failure, which is counted."""
        error = None
        answer = None
        num_bytes = 0
        metadata = (("authorization", _AUTHORIZATION),) if _TOKEN else ()
        began = time.perf_counter()
        try:
            answer = getattr(self._stub, method)(request, timeout=TIMEOUT_S, metadata=metadata)
            num_bytes = answer.ByteSize()
        except grpc.RpcError as failure:
            error = RpcFailure(failure.code().name)
        self.environment.events.request.fire(
            request_type="gRPC",
            name=method,
            response_time=1000 * (time.perf_counter() - began),
            response_length=num_bytes,
            exception=error,
            context={},
        )
        return answer

    def _connect(self, number: int) -> grpc.Channel:
        """A connection to a server behind the address; sessions stay where they opened."""
        if number not in self._channels:
            self._channels[number] = self._open_channel()
        return self._channels[number]

    def _open_channel(self) -> grpc.Channel:
        config = '{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}'
        options = [
            # A pool of its own: channels to one address would share one connection.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.service_config", config),
            ("grpc.enable_retries", 0),
        ]
        if _SECURITY.tls is None:
            return grpc.insecure_channel(self.host, options)
        files = _SECURITY.tls.files.get()
        credentials = grpc.ssl_channel_credentials(files.authority, files.key, files.chain)
        return grpc.secure_channel(self.host, credentials, options)
