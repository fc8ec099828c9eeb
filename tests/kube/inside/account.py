"""Runs inside a gateway pod: prints the account and the closed groups as a line of JSON."""

from __future__ import annotations

import asyncio
import json

from sdar.bus.ledger import CLOSING
from sdar.bus.redis import RedisBus
from sdar.config import load_config
from sdar.process.settings import load_settings


async def read() -> dict[str, object]:
    settings = load_settings()
    config = load_config(settings.config)
    bus = RedisBus(settings.redis_url, config.name, config.stream_consumers)
    try:
        account = await bus.read_ledger()
        closed = {outcome.value: await bus.list_closed(outcome) for outcome in CLOSING}
    finally:
        await bus.close()
    return {
        "issued": account.num_issued,
        "generated": account.num_generated,
        "counts": {outcome.value: number for outcome, number in account.closed.items()},
        "open": account.open,
        "closed": closed,
    }


print(json.dumps(asyncio.run(read())))
