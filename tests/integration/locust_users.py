"""Six users of the load test until each of the named requests was made: `CLASS HOST NAME...`.

A process of its own, since Locust patches the one that it is imported into. Prints requests and
failures as JSON.
"""

from __future__ import annotations

from locust.env import Environment  # first: it patches what others import

# isort: split
import json
import sys

import gevent

from loadtest import locustfile

_TIMEOUT_S = 60.0


def main() -> None:
    users, host, *names = sys.argv[1:]
    environment = Environment(user_classes=[getattr(locustfile, users)], host=host)
    runner = environment.create_local_runner()
    runner.start(6, spawn_rate=6)
    with gevent.Timeout(_TIMEOUT_S, False):
        while not set(names) <= {name for name, _ in environment.stats.entries}:
            gevent.sleep(0.05)
    runner.quit()
    counts = {
        name: (entry.num_requests, entry.num_failures)
        for (name, _), entry in environment.stats.entries.items()
    }
    errors = sorted({str(error.error) for error in environment.stats.errors.values()})
    print(
        json.dumps(
            {
                "counts": counts,
                "errors": errors,
                "exceptions": [one["msg"] for one in runner.exceptions.values()],
            }
        )
    )


if __name__ == "__main__":
    main()
