"""How a service ends: the first failure takes the others along, and is the one that is told."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from sdar.process.lifecycle import run_until_stopped


async def test_a_failure_stops_the_others_and_what_they_raise_then_is_left_untold() -> None:
    untold: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: untold.append(context))

    async def fails(stopping: asyncio.Event) -> None:
        raise ValueError("the cause")

    async def fails_when_stopped(stopping: asyncio.Event) -> None:
        await stopping.wait()
        raise ValueError("a consequence")

    with pytest.raises(ValueError, match="the cause"):
        await run_until_stopped(fails_when_stopped, fails, fails_when_stopped)
    gc.collect()
    assert untold == []
