"""Any OpenEnv server as an environment: one WebSocket connection there is one session."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

from sdar.contracts.errors import CapacityError, ConfigurationError, EnvironmentFailedError
from sdar.environments.base import Observation, StepResult
from services.envs.adapters.seeded import (
    SeededEnvironment,
    find_action,
    format_facts,
    format_value,
    parse_json,
)

CLOSING_TIMEOUT_S = 2.0
FULL_TIMEOUT_S = 2.0
"""How long a full server is asked again: an episode just closed may still hold its place there."""
FULL_RETRY_S = 0.05
MAX_MESSAGE_BYTES = 16 << 20
"""What the web server under an OpenEnv server accepts by default."""

_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
_REFUSED_ACTION = "VALIDATION_ERROR"
_FULL = "CAPACITY_REACHED"


class OpenEnvEnvironment(SeededEnvironment):
    """Whatever an OpenEnv server plays.

    A task is the seed its `reset` gets; a server that ignores seeds has but one task. The agent's
    text goes into one field of the action, or, if it is a JSON object, is the whole action. An
    action that the server finds malformed is invalid and uses a turn. OpenEnv has one `done`, which
    counts as terminated; an episode that is done with a positive last reward counts as solved.

    Args:
        url: of the server, http or ws.
        action_field: of the action, where the text goes; "" for the only text that the action
            requires.
        num_tasks: of the train split.
        max_turns: turns after which an episode is truncated; an OpenEnv server does not publish
            its own limit.
        timeout_s: for one answer of the server; keep it below the step timeout of this server,
            which kills the worker.
    """

    name = "openenv"
    is_blocking = True

    def __init__(
        self,
        *,
        url: str,
        action_field: str = "",
        num_tasks: int = 1000,
        max_turns: int = 50,
        timeout_s: float = 20.0,
    ) -> None:
        if type(max_turns) is not int or max_turns < 1 or not timeout_s > 0:
            raise ConfigurationError(
                f"Options max_turns {max_turns!r} and timeout_s {timeout_s!r} of openenv must be "
                "above 0, turns an integer."
            )
        self._timeout_s = float(timeout_s)
        self._server = _look_up(str(url), self._timeout_s)
        super().__init__(num_tasks=num_tasks, game=self._server.name)
        self._action_field = self._server.find_action_field(action_field)
        self.version = f"2/{self._server.name}-{self._server.version}"
        self.instructions = self._server.description
        self.action_format = self._server.describe_action(self._action_field)
        self.max_turns = max_turns

        self._connection: ClientConnection | None = None
        self._ending = contextlib.ExitStack()
        self._is_closed = False

    def reset(self, task_id: str, seed: int) -> Observation:
        seed = self.compute_seed(task_id, seed)
        deadline = time.monotonic() + FULL_TIMEOUT_S
        while True:
            try:
                self._connection = self._connection or self._connect()
                answer = self._ask("reset", {"seed": seed})
                if answer is None:
                    raise self._failure("refused to begin an episode. See its log.")
                return self._observe(answer)
            except CapacityError:
                self._hang_up()
                if time.monotonic() > deadline or self._is_closed:
                    raise
                time.sleep(FULL_RETRY_S)

    def step(self, text: str) -> StepResult:
        written = find_action(text)
        action = self._to_action(written)
        answer = None if action is None else self._ask("step", action)
        if answer is None:
            refusal = f"That is no action here. {self.action_format}"
            return StepResult(Observation(refusal), action=written, is_action_valid=False)

        reward = float(answer.get("reward") or 0.0)
        is_done = bool(answer.get("done"))
        return StepResult(
            observation=self._observe(answer),
            reward=reward,
            terminated=is_done,
            action=written,
            is_success=is_done and reward > 0,
        )

    def close(self) -> None:
        """End the connection, and let a server that listens free its place before this returns."""
        self._is_closed = True
        connection = self._connection
        # On this message an OpenEnv server first frees the session's place and then closes the
        # connection. If a call hangs in another thread, that thread holds the receiving end, and
        # there is nothing to wait for.
        with contextlib.suppress(WebSocketException, TimeoutError):
            if connection is not None:
                connection.send(json.dumps({"type": "close"}))
                while True:
                    connection.recv(timeout=CLOSING_TIMEOUT_S)
        self._hang_up()

    def _hang_up(self) -> None:
        self._connection = None
        self._ending.close()

    def _connect(self) -> ClientConnection:
        try:
            connection = self._ending.enter_context(
                connect(
                    self._server.websocket_url,
                    open_timeout=self._timeout_s,
                    close_timeout=CLOSING_TIMEOUT_S,
                    max_size=MAX_MESSAGE_BYTES,
                    # The server pings; a second pinger would cost a thread a session.
                    ping_interval=None,
                )
            )
        except (OSError, WebSocketException) as error:
            raise self._failure(
                f"cannot be reached: {error}. Start it, then open another session."
            ) from error
        # Closed by another thread while this one was waiting.
        if self._is_closed:
            self._hang_up()
            raise self._failure(
                "was given up while it was being connected to. Open another session."
            )
        return connection

    def _ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any] | None:
        """The server's answer; None if it finds the action malformed."""
        answer = self._exchange(kind, data)
        match answer:
            case {"type": "observation", "data": {"observation": dict()} as data}:
                observed: dict[str, Any] = data
                return observed
            case {"type": "error", "data": {"code": code}} if (
                code == _REFUSED_ACTION and kind == "step"
            ):
                return None
            case {"type": "error", "data": {"code": code} as error}:
                self._raise(kind, str(code), str(error.get("message")))
        raise self._failure(
            f"answered {kind} with {str(answer)[:200]}, expected an observation. Use openenv-core "
            "0.3."
        )

    def _exchange(self, kind: str, data: Mapping[str, Any]) -> Any:
        connection = self._connection
        if connection is None:
            raise self._failure("has no session of this episode any more. Open another.")
        try:
            # A full server says so unasked, and hangs up: its word is still there to be received.
            with contextlib.suppress(ConnectionClosed):
                connection.send(json.dumps({"type": kind, "data": data}))
            return parse_json(str(connection.recv(timeout=self._timeout_s)))
        except TimeoutError as error:
            raise self._failure(
                f"gave no answer to {kind} in {self._timeout_s:g} s. Raise option timeout_s."
            ) from error
        except (OSError, WebSocketException) as error:
            raise self._failure(
                f"hung up during {kind}: {error}. See its log, open another session."
            ) from error

    def _raise(self, kind: str, code: str, message: str) -> NoReturn:
        if code == _FULL:
            raise CapacityError(
                f"The OpenEnv server {self._server.url} is full: {message}. Raise its "
                "max_concurrent_envs to at least the capacity served here, or retry after a while."
            )
        raise self._failure(
            f"failed in {kind} with {code}: {message}. See its log, open another session."
        )

    def _failure(self, problem: str) -> EnvironmentFailedError:
        return EnvironmentFailedError(
            f"The OpenEnv server {self._server.url} {problem}", environment=self.name
        )

    def _to_action(self, written: str) -> dict[str, Any] | None:
        whole = parse_json(written)
        if isinstance(whole, dict):
            return whole
        if not written or not self._action_field:
            return None
        return {self._action_field: written}

    @staticmethod
    def _observe(answer: Mapping[str, Any]) -> Observation:
        fields = {name: value for name, value in answer["observation"].items() if value is not None}
        values = list(fields.values())
        if len(values) == 1 and isinstance(values[0], str):
            return Observation(values[0])
        return Observation(format_value(fields), info=format_facts(fields))


@dataclass(frozen=True, slots=True)
class _Server:
    """What an OpenEnv server says of itself.

    `fields` are those of its action by name, each as a JSON schema.
    """

    url: str
    websocket_url: str
    name: str
    version: str
    description: str
    fields: Mapping[str, Mapping[str, Any]]
    required: tuple[str, ...]

    def find_action_field(self, wanted: str) -> str:
        """The field that takes the text; "" if there is none, and only JSON objects are actions."""
        if wanted and wanted not in self.fields:
            raise ConfigurationError(
                f"The action of {self.url} has no field {wanted!r}. Set option action_field to one "
                f"of {', '.join(self.fields)}."
            )
        if wanted:
            return wanted
        known = [name for name in self.required if name in self.fields]
        texts = [name for name in known if self.fields[name].get("type") == "string"]
        return texts[0] if len(texts) == 1 else ""

    def describe_action(self, field: str) -> str:
        if field:
            description = self.fields[field].get("description") or "any text"
            return f"The {field}: {description}, alone or in <action> tags."
        described = [f"{name}: {fact.get('type', 'any')}" for name, fact in self.fields.items()]
        needed = ", ".join(self.required) or "none"
        return (
            f"A JSON object with {', '.join(described)} (needed: {needed}), "
            "alone or in <action> tags."
        )


@lru_cache
def _look_up(url: str, timeout_s: float) -> _Server:
    """Ask a server what it plays; once in a process."""
    websocket_url = _find_websocket_url(url)
    # ws becomes http, and wss https.
    http_url = websocket_url.replace("ws", "http", 1)
    try:
        facts = _fetch(f"{http_url}/metadata", timeout_s)
        action = _fetch(f"{http_url}/schema", timeout_s)["action"]
        name = str(facts["name"])
        # Every OpenEnv action has metadata; it is no part of what is played.
        names = [field for field in action["properties"] if field != "metadata"]
        fields = {field: dict(action["properties"][field]) for field in names}
    except (httpx.HTTPError, OSError) as error:
        raise EnvironmentFailedError(
            f"The OpenEnv server {url} does not answer: {error}. Start it first."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{url} does not describe itself as OpenEnv servers do: {error!r}. Check the url."
        ) from error
    return _Server(
        url=url,
        websocket_url=f"{websocket_url}/ws",
        name=name,
        version=str(facts.get("version") or "unversioned"),
        description=str(facts.get("description") or ""),
        fields=fields,
        required=tuple(action.get("required") or ()),
    )


def _find_websocket_url(url: str) -> str:
    """The server's address for WebSockets, without the last part /ws."""
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.netloc:
        raise ConfigurationError(
            f"Option url of openenv is {url!r}, expected http://HOST:PORT or ws://HOST:PORT. "
            "Correct it."
        )
    path = parts.path.rstrip("/").removesuffix("/ws")
    return f"{_SCHEMES[parts.scheme]}://{parts.netloc}{path}"


def _fetch(url: str, timeout_s: float) -> dict[str, Any]:
    response = httpx.get(url, timeout=timeout_s)
    response.raise_for_status()
    return dict(response.json())
