"""A release whose services and callers all use TLS, with a generated authority."""

from __future__ import annotations

import json
from typing import Any

from tests.kube.cluster import ROLES, Cluster, wait
from tests.kube.release import READY_TIMEOUT_S, Release, describe

NUM_UPDATES = 4


def test_a_release_with_tls_trains_and_passes_its_test(
    cluster: Cluster, evidence: list[str]
) -> None:
    with Release(cluster, "private") as release:
        release.install(
            tls__enabled=True,
            tls__clientAuth="grpc",
            run__training__num_updates=NUM_UPDATES,
            run__evaluation__num_tasks=8,
        )
        ready_s = release.wait_ready(dict.fromkeys((*ROLES, "redis"), 1))
        status = wait("its end", lambda: _find_end(release), READY_TIMEOUT_S, poll_s=5.0)
        release.test()
        evidence.append(f"ready after {ready_s:.0f} s; {describe(status)}; helm test succeeded")
        assert status["num_updates"] == NUM_UPDATES
        assert status["ledger_gap"] == 0
        assert _ask_without_tls(release).startswith("refused")


def _find_end(release: Release) -> dict[str, Any] | None:
    status: dict[str, Any] = json.loads(release.sdar("status", *release.address, "--json"))
    return status if status["phase"] == "finished" else None


def _ask_without_tls(release: Release) -> str:
    script = """
import urllib.request, http.client
try:
    print(urllib.request.urlopen("http://127.0.0.1:8080/healthz", timeout=5).status)
except (OSError, http.client.HTTPException) as error:
    print("refused", error)
"""
    return release.cluster.run_python(f"deployment/{release.fullname}-gateway", script)
