"""Shared by tests of the `sdar` command: server processes, and `sdar env ...` as users run it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SDAR = (sys.executable, "-m", "sdar.cli.main")

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0


@dataclass
class Server:
    """A server that answers. `code` is its exit code once it has been stopped."""

    address: str
    code: int | None = None


@dataclass
class Ended:
    """A command that has come to its end."""

    code: int
    stdout: str
    stderr: str

    @property
    def told(self) -> dict[str, Any]:
        return json.loads(self.stdout)


@asynccontextmanager
async def server_process(command: Sequence[str], directory: Path = ROOT) -> AsyncIterator[Server]:
    """Run a server that says `Serving NAME on HOST:PORT`; SIGTERM stops it at the end."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=directory, stdin=DEVNULL, stdout=PIPE, stderr=None
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            line = (await process.stdout.readline()).decode()
        found = re.search(r"Serving .* on (\S+:\d+)", line)
        assert found, f"{' '.join(command)} said {line!r}"
        server = Server(found[1])
        yield server
        process.terminate()
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            server.code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def run_sdar(
    *arguments: str, typed: str = "", environment: Mapping[str, str] | None = None
) -> Ended:
    """Run `sdar ARGUMENTS`, with `typed` on its standard input; a lone surrogate there is a byte
    that is no text.

    Args:
        environment: variables beside those of the test.
    """
    variables = {**os.environ, **(environment or {})}
    process = await asyncio.create_subprocess_exec(
        *SDAR, *arguments, cwd=ROOT, env=variables, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    stdout, stderr = await process.communicate(typed.encode(errors="surrogateescape"))
    assert process.returncode is not None
    return Ended(process.returncode, stdout.decode(), stderr.decode())


async def check_in_full(address: str) -> None:
    """`sdar env check` has to pass with nothing left out."""
    ended = await run_sdar("env", "check", address, "--json")
    assert ended.code in (0, 1), ended.stderr
    blemishes = [
        (one["id"], one["expected"], one["got"])
        for one in ended.told["checks"]
        if one["verdict"] != "PASS"
    ]
    assert not blemishes
    assert (ended.code, ended.told["num_failed"], ended.told["num_not_run"]) == (0, 0, 0)
