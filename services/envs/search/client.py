"""Calls a retriever service over HTTP, with bounded retries and typed errors."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

from sdar.contracts.errors import ConfigurationError, UnavailableError
from sdar.process.settings import load_settings
from sdar.process.text import hide_credentials
from sdar.wire.http_client import client_options
from sdar.wire.security import Security
from services.envs.search.passages import Hit, Passage

# 100 passages for each of 2,048 queries would be more; an environment asks one at a time.
MAX_ANSWER_BYTES = 16 << 20
MAX_TIMEOUT_S = 600
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 2.0
_LEAST_ATTEMPT_S = 0.01
_KEPT_CONNECTIONS = 64
"""As many as threads that may search at once."""
_ATTEMPTS_WITHIN_BOUND = 2
"""One slow attempt leaves time for another."""


class RetrieverFailedError(UnavailableError):
    """A retriever that is down, slow, or answers nonsense, still after retries."""


class RetrieverClient:
    """A retriever in another process.

    Each environment has a client of its own; all clients of a process share their connections.

    Args:
        url: the service, without /retrieve.
        timeout_s: a call, retries included, takes no longer.

    Raises:
        ConfigurationError: no http or https address, or a timeout out of range.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        if not _is_address(url):
            raise ConfigurationError(
                f"retriever_url is {hide_credentials(url)!r}, expected an address such as "
                "http://127.0.0.1:8000."
            )
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ConfigurationError(
                f"retriever_timeout_s is {timeout_s}, expected above 0 and at most {MAX_TIMEOUT_S} "
                "seconds."
            )
        self._url = f"{url.rstrip('/')}/retrieve"
        self._timeout_s = timeout_s
        self._http = _borrow_http()
        self._closed = threading.Event()

    def retrieve(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Raises RetrieverFailedError, at the latest after the timeout."""
        request = {"queries": list(queries), "topk": topk, "return_scores": True}
        ends_at = time.monotonic() + self._timeout_s
        delay_s = FIRST_DELAY_S
        for num_attempts in itertools.count(1):
            try:
                return self._attempt(request, self._time_for_attempt(ends_at))
            except AttemptFailedError as error:
                # `close` ends the wait, so that an episode need not wait for a dead retriever.
                is_over = time.monotonic() + delay_s >= ends_at or not error.is_worth_retrying
                if is_over or self._closed.wait(delay_s):
                    raise RetrieverFailedError(
                        f"Retriever {hide_credentials(self._url)} failed, attempt {num_attempts} "
                        f"with {error}. Check that it runs and is ready (GET /readyz)."
                    ) from error
                delay_s = min(2 * delay_s, MAX_DELAY_S)
        raise AssertionError("attempts are counted without end")

    def _time_for_attempt(self, ends_at: float) -> float:
        """Seconds, never more than are left."""
        left_s = ends_at - time.monotonic()
        share_s = self._timeout_s / _ATTEMPTS_WITHIN_BOUND
        # To a socket a negative timeout is an error.
        return max(_LEAST_ATTEMPT_S, min(share_s, left_s))

    def close(self) -> None:
        """End a call that waits for its next attempt, and give up the connections."""
        if not self._closed.is_set():
            self._closed.set()
            _return_http()

    def _attempt(self, request: dict[str, Any], timeout_s: float) -> list[list[Hit]]:
        ends_at = time.monotonic() + timeout_s
        try:
            with self._http.stream("POST", self._url, json=request, timeout=timeout_s) as response:
                body = _read_body(response, ends_at)
        except httpx.HTTPError as error:
            raise AttemptFailedError(f"{type(error).__name__}: {error}") from error

        status = response.status_code
        if status != httpx.codes.OK:
            # Any other 4xx says that the request itself is wrong.
            is_worth_retrying = status >= 500 or status == httpx.codes.TOO_MANY_REQUESTS
            text = body[:200].decode(errors="replace")
            raise AttemptFailedError(
                f"HTTP {status}, {text!r}", is_worth_retrying=is_worth_retrying
            )
        return parse_answer(body, len(request["queries"]))


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


class AttemptFailedError(Exception):
    """One attempt failed. The caller gets it only as the cause of the last one's error."""

    def __init__(self, message: str, *, is_worth_retrying: bool = True) -> None:
        super().__init__(message)
        self.is_worth_retrying = is_worth_retrying


def parse_answer(body: bytes, num_queries: int) -> list[list[Hit]]:
    """The hits of each query. Raises AttemptFailedError for any other answer."""
    try:
        result = json.loads(body)["result"]
        hits = [list(map(_parse_hit, entries)) for entries in result]
    except (ValueError, TypeError, KeyError) as error:
        shown = body[:200].decode(errors="replace")
        raise AttemptFailedError(
            f"an answer that cannot be read ({type(error).__name__}: {error}), {shown!r}"
        ) from error
    if len(hits) != num_queries:
        raise AttemptFailedError(f"results of {len(hits)} queries for {num_queries} asked")
    return hits


def _parse_hit(entry: Any) -> Hit:
    document = entry["document"]
    contents = document["contents"]
    if not isinstance(contents, str):
        raise TypeError(f"contents is a {type(contents).__name__}")
    passage = Passage(str(document.get("id", "")), contents)
    return Hit(passage, float(entry["score"]))


def _read_body(response: httpx.Response, ends_at: float) -> bytes:
    """The whole body, unless it drips for too long or never ends."""
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise AttemptFailedError(
                f"an answer of more than {MAX_ANSWER_BYTES} bytes", is_worth_retrying=False
            )
        if time.monotonic() > ends_at:
            raise AttemptFailedError("an answer that did not end in time")
    return bytes(body)


_http_lock = threading.Lock()
_http: httpx.Client | None = None
_num_borrowers = 0


def _borrow_http() -> httpx.Client:
    """The process's connections, made for the first who needs them."""
    global _http, _num_borrowers
    with _http_lock:
        if _http is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=_KEPT_CONNECTIONS)
            # A retriever is a service of one's own: it is shown our token, and never by way of a
            # proxy meant for the outside.
            _http = httpx.Client(
                limits=limits, **client_options(Security.from_settings(load_settings()))
            )
        _num_borrowers += 1
        return _http


def _return_http() -> None:
    """Give the connections up; with the last borrower they are closed."""
    global _http, _num_borrowers
    with _http_lock:
        _num_borrowers -= 1
        if not _num_borrowers and _http is not None:
            _http.close()
            _http = None
