"""A process that starts another, as vLLM starts its engine core, and waits.

Run as a module; prints the other one's pid.
"""

from __future__ import annotations

import multiprocessing
import threading
from multiprocessing.connection import Connection


def hold(ready: Connection) -> None:
    """The engine core's part: import the worker extension, then live on."""
    import sdar.engines.vllm_worker  # noqa: F401

    ready.send(None)
    threading.Event().wait()


def main() -> None:
    """The service's part: it never ends by itself."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=hold, args=(there,))
    child.start()
    here.recv()
    print(child.pid, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
