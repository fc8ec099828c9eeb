"""The guard of an HTTP application: roles by method, bounds, foreign pages, headers."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from sdar.contracts.errors import CapacityError, SdarError
from sdar.process.settings import Settings
from sdar.wire.door import CLIENT
from sdar.wire.http_server import MAX_BODY_BYTES, Guard, answer_error, build_page_policy
from sdar.wire.security import OPEN, Security

READ_TOKEN, OPERATE_TOKEN = "r" * 40, "o" * 40
PAGE = "<html><style>a{}</style><script>\nrun();\n</script></html>"


def build_app() -> FastAPI:
    app = FastAPI(docs_url=None)
    app.add_exception_handler(SdarError, answer_error)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": build_page_policy(PAGE)})

    @app.get("/metrics")
    async def metrics() -> str:
        return "sdar 1"

    @app.get("/v1/run")
    async def run() -> str:
        return CLIENT.get()

    @app.post("/v1/run/stop")
    async def stop(request: Request) -> int:
        return len(await request.body())

    @app.post("/retrieve")
    async def retrieve() -> str:
        return "found"

    @app.post("/full")
    async def full() -> None:
        raise CapacityError("Full.", retry_after_s=2.4)

    return app


@pytest.fixture
def locked(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"read:{READ_TOKEN}\noperate:{OPERATE_TOKEN}")
    return Security.from_settings(Settings(tokens_file=path))


def ask(
    security: Security = OPEN,
    host: str = "127.0.0.1",
    url: str = "http://127.0.0.1:8080",
    **options,
) -> httpx.AsyncClient:
    guard = Guard(build_app(), security, host, read_posts=("/retrieve",), **options)
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(guard, client=("10.0.0.7", 5)), base_url=url
    )


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    ("method", "path", "without", "read", "operate"),
    [
        ("GET", "/", 200, 200, 200),
        ("GET", "/metrics", 200, 200, 200),
        ("GET", "/v1/run", 401, 200, 200),
        ("HEAD", "/v1/run", 401, 405, 405),
        ("POST", "/v1/run/stop", 401, 403, 200),
        ("PUT", "/v1/run", 401, 403, 405),
        ("OPTIONS", "/v1/run", 401, 403, 405),
        ("POST", "/metrics", 401, 403, 405),
        ("POST", "/retrieve", 401, 200, 200),
        ("GET", "/nowhere", 401, 404, 404),
        ("GET", "//metrics", 401, 404, 404),
        ("GET", "/metrics/", 401, 307, 307),
        ("GET", "/metrics%2f..%2fv1/run", 401, 404, 404),
        ("GET", "/openapi.json", 401, 200, 200),
    ],
)
async def test_reading_takes_the_read_role_and_everything_else_operate(
    locked, method, path, without, read, operate
):
    async with ask(locked) as client:
        # As bytes: the client would tidy the path up.
        url = httpx.URL(scheme="http", host="127.0.0.1", port=8080, raw_path=path.encode())
        headers = ({}, bearer(READ_TOKEN), bearer(OPERATE_TOKEN))
        found = [(await client.request(method, url, headers=one)).status_code for one in headers]
    assert found == [without, read, operate]


async def test_a_refusal_says_what_to_send_in_the_one_form_of_errors(locked):
    async with ask(locked) as client:
        answer = await client.get("/v1/run", headers=bearer("w" * 40))
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["reason"] == "UNAUTHENTICATED"
    assert "SDAR_TOKEN" in answer.json()["error"]["message"]
    assert "w" * 40 not in answer.text


async def test_the_application_learns_who_asks(locked):
    async with ask(locked) as client:
        assert (await client.get("/v1/run", headers=bearer(READ_TOKEN))).json().startswith("token-")
    async with ask() as client:
        assert (await client.get("/v1/run")).json() == "10.0.0.7"


async def test_a_client_over_its_rate_gets_429_and_when_to_come_back():
    async with ask(Security(max_calls_per_s=0.5)) as client:
        assert (await client.get("/v1/run")).status_code == 200
        answer = await client.get("/v1/run")
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "2")


async def test_an_applications_own_refusal_tells_when_to_come_back():
    async with ask() as client:
        answer = await client.post("/full")
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "3")


async def test_a_body_at_the_bound_arrives_whole_and_one_byte_more_is_refused():
    async with ask() as client:
        assert (
            await client.post("/v1/run/stop", content=b"x" * MAX_BODY_BYTES)
        ).json() == MAX_BODY_BYTES
        for content in (b"x" * (MAX_BODY_BYTES + 1), stream(b"x" * MAX_BODY_BYTES, b"x")):
            answer = await client.post("/v1/run/stop", content=content)
            assert (answer.status_code, answer.json()["error"]["reason"]) == (413, "TOO_LARGE")


async def stream(*chunks: bytes):
    for chunk in chunks:
        yield chunk


async def test_a_body_that_does_not_arrive_is_not_waited_for():
    guard = Guard(build_app(), OPEN, "127.0.0.1", body_timeout_s=0.01)
    sent = []

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"127.0.0.1")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/run/stop",
        "headers": headers,
        "client": ("127.0.0.1", 1),
    }
    await guard(scope, receive, send)
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:8080"}, 200),
        ({"Host": "localhost:8080"}, 200),
        ({"Host": "[::1]:8080", "Origin": "http://[::1]:8080"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example:8080"}, 403),
        ({"Host": "evil.example:8080", "Origin": "http://evil.example:8080"}, 403),
        ({"Host": ""}, 403),
    ],
)
async def test_a_foreign_page_in_a_local_browser_cannot_stop_an_open_run(headers, status):
    """By a form or fetch from elsewhere (Origin), or by a false name of 127.0.0.1 (Host)."""
    async with ask() as client:
        assert (await client.post("/v1/run/stop", headers=headers)).status_code == status


async def test_with_tokens_any_name_of_the_server_will_do(locked):
    async with ask(locked, host="0.0.0.0", url="http://gateway.example:8080") as client:
        assert (await client.get("/v1/run", headers=bearer(READ_TOKEN))).status_code == 200


async def test_every_answer_forbids_frames_sniffing_and_caching(locked):
    async with ask(locked) as client:
        for answer in (
            await client.get("/metrics"),
            await client.get("/v1/run"),
            await client.get("/"),
        ):
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert answer.headers["Cache-Control"] == "no-store"
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
            assert "unsafe" not in answer.headers["Content-Security-Policy"]


def test_a_page_runs_its_own_script_and_style_and_no_other():
    """The digests are of `echo -ne '\\nrun();\\n' | openssl dgst -sha256 -binary | base64`."""
    policy = build_page_policy(PAGE)
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-8Nic6TNoKbU2fN/Yduzc28MgjFgcikm6fSU0x0dR3EU='" in policy
    assert "style-src 'sha256-X1RutGBrXCt9KkSaXMK7tHftWiRscFHOhxsS8tv8hBk='" in policy


async def test_web_sockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    await Guard(build_app(), OPEN, "127.0.0.1")({"type": "websocket", "path": "/"}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]
