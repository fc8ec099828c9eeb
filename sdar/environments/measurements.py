"""The metrics of an environment server, each declared here once; docs/metrics.md lists them."""

from __future__ import annotations

from prometheus_client import REGISTRY

from sdar.process.measurements import Counter, Declarations, Gauge, Histogram, Label, Meters

_ENVIRONMENT = Label("environment")

ENVIRONMENTS = Declarations()

SESSIONS = ENVIRONMENTS.declare(
    Gauge("sdar_env_sessions", "sessions", "Sessions that hold a place.")
)
CAPACITY = ENVIRONMENTS.declare(
    Gauge("sdar_env_capacity_sessions", "sessions", "Places there are (environment.capacity).")
)
OPENED = ENVIRONMENTS.declare(
    Counter(
        "sdar_env_sessions_opened_total",
        "sessions",
        "Episodes started.",
        (_ENVIRONMENT,),
    )
)
STEPS = ENVIRONMENTS.declare(
    Counter("sdar_env_steps_total", "steps", "Steps played.", (_ENVIRONMENT,))
)
STEP_SECONDS = ENVIRONMENTS.declare(
    Histogram(
        "sdar_env_step_seconds",
        "seconds",
        "From a step's request to its answer, its wait for the worker included.",
        (_ENVIRONMENT,),
        # Many environments answer within a millisecond.
        buckets=(
            0.0005,
            0.001,
            0.0025,
            0.005,
            0.01,
            0.025,
            0.05,
            0.1,
            0.25,
            0.5,
            1,
            2.5,
            5,
            10,
            30,
        ),
    )
)
REAPED = ENVIRONMENTS.declare(
    Counter("sdar_env_sessions_reaped_total", "sessions", "Sessions whose lease ran out.")
)
FAILURES = ENVIRONMENTS.declare(
    Counter(
        "sdar_env_failures_total",
        "failures",
        "Episodes lost to a failing environment.",
        (_ENVIRONMENT,),
    )
)
WORKERS = ENVIRONMENTS.declare(
    Gauge("sdar_env_workers", "workers", "Worker processes that play sessions.")
)
RESTARTS = ENVIRONMENTS.declare(
    Counter(
        "sdar_env_worker_restarts_total",
        "processes",
        "Worker processes started in the place of one that died.",
    )
)

METERS = Meters(ENVIRONMENTS, REGISTRY)
"""Of this process: it has one server."""
