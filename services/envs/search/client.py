"""Owns calls to a retriever service: one HTTP client per service and process, retries within a bound, and typed failure."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

from sdar.contracts.errors import ConfigurationError, UnavailableError
from services.envs.search.passages import Hit, Passage

MAX_ANSWER_BYTES = 16 << 20
FIRST_DELAY_S, MAX_DELAY_S = 0.1, 2.0
TOO_MANY_REQUESTS = 429
_KEPT_CONNECTIONS = 64
"""As many as threads that may search at once."""
_ATTEMPTS_WITHIN_BOUND = 2
"""One slow attempt leaves time for another."""


class RetrieverFailedError(UnavailableError):
    """A retriever that is down, slow, or answers nonsense, still after retries."""


class RetrieverClient:
    """A retriever in another process. May be shared by threads.

    Args:
        url: the service, without /retrieve.
        timeout_s: a call, retries included, takes no longer.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.key = (url, timeout_s)
        self._url = f"{url.rstrip('/')}/retrieve"
        self._timeout_s = timeout_s
        # A retriever is a service of one's own: never by way of a proxy meant for the outside.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_KEPT_CONNECTIONS)
        self._http = httpx.Client(timeout=timeout_s / _ATTEMPTS_WITHIN_BOUND, limits=limits, trust_env=False)
        self._closing = threading.Event()

    def retrieve(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Raises RetrieverFailedError, at the latest after the timeout."""
        request = {"queries": list(queries), "topk": topk, "return_scores": True}
        ends_at, delay_s, num_attempts = time.monotonic() + self._timeout_s, FIRST_DELAY_S, 0
        while True:
            num_attempts += 1
            try:
                return self._attempt(request, min(ends_at, time.monotonic() + self._timeout_s / _ATTEMPTS_WITHIN_BOUND))
            except _AttemptFailedError as error:
                is_over = time.monotonic() + delay_s >= ends_at or not error.is_worth_retrying
                if is_over or self._closing.wait(delay_s):
                    raise RetrieverFailedError(
                        f"Retriever {self._url} failed after {num_attempts} attempts, the last time: {error}. "
                        "Check that it runs and is ready (GET /readyz)."
                    ) from error
                delay_s = min(2 * delay_s, MAX_DELAY_S)

    def close(self) -> None:
        """End calls that wait to be retried, and close the connections."""
        self._closing.set()
        self._http.close()

    def _attempt(self, request: dict[str, Any], ends_at: float) -> list[list[Hit]]:
        try:
            with self._http.stream("POST", self._url, json=request) as response:
                body = _read_body(response, ends_at)
        except httpx.HTTPError as error:
            raise _AttemptFailedError(f"{type(error).__name__}: {error}") from error
        if response.status_code != httpx.codes.OK:
            is_worth_retrying = response.status_code >= 500 or response.status_code == TOO_MANY_REQUESTS
            text = body[:200].decode(errors="replace")
            raise _AttemptFailedError(f"HTTP {response.status_code}, {text!r}", is_worth_retrying=is_worth_retrying)
        return parse_answer(body, len(request["queries"]))


class _AttemptFailedError(Exception):
    def __init__(self, message: str, *, is_worth_retrying: bool = True) -> None:
        super().__init__(message)
        self.is_worth_retrying = is_worth_retrying


def parse_answer(body: bytes, num_queries: int) -> list[list[Hit]]:
    """The hits of each query. Raises _AttemptFailedError for anything but the answer that was asked for."""
    try:
        result = json.loads(body)["result"]
        hits = [[_parse_hit(entry) for entry in entries] for entries in result]
    except (ValueError, TypeError, KeyError) as error:
        shown = body[:200].decode(errors="replace")
        raise _AttemptFailedError(f"an answer that cannot be read ({type(error).__name__}: {error}), {shown!r}") from error
    if len(hits) != num_queries:
        raise _AttemptFailedError(f"results of {len(hits)} queries for {num_queries} asked")
    return hits


def _parse_hit(entry: Any) -> Hit:
    document = entry["document"]
    if not isinstance(document["contents"], str):
        raise TypeError(f"contents is a {type(document['contents']).__name__}")
    return Hit(Passage(str(document.get("id", "")), document["contents"]), float(entry["score"]))


def _read_body(response: httpx.Response, ends_at: float) -> bytes:
    """The whole body, unless it drips for too long or never ends."""
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise _AttemptFailedError(f"an answer of more than {MAX_ANSWER_BYTES} bytes", is_worth_retrying=False)
        if time.monotonic() > ends_at:
            raise _AttemptFailedError("an answer that did not end in time")
    return bytes(body)


_clients: dict[tuple[str, float], tuple[RetrieverClient, int]] = {}
_clients_lock = threading.Lock()


def borrow_client(url: str, timeout_s: float) -> RetrieverClient:
    """The process's client of a service, made for its first borrower. Give it back with `return_client`.

    Raises:
        ConfigurationError: no http or https address, or no positive timeout.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"retriever_url is {url!r}, expected an address such as http://127.0.0.1:8000.")
    if not timeout_s > 0:
        raise ConfigurationError(f"retriever_timeout_s is {timeout_s}, expected a positive number of seconds.")
    with _clients_lock:
        client, num_borrowers = _clients.get((url, timeout_s)) or (RetrieverClient(url, timeout_s), 0)
        _clients[client.key] = client, num_borrowers + 1
        return client


def return_client(client: RetrieverClient) -> None:
    """The last borrower closes the client."""
    with _clients_lock:
        _, num_borrowers = _clients[client.key]
        if num_borrowers > 1:
            _clients[client.key] = client, num_borrowers - 1
            return
        del _clients[client.key]
    client.close()
