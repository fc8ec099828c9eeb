"""What several test suites share.

Waiting is always for a condition, with a deadline that fails the test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHIPPED_SEARCH_DATA = EXAMPLES / "data" / "search"


async def until(is_reached: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Return once `is_reached()`; raises TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        # The condition belongs to code that offers no event for it.
        while not is_reached():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
