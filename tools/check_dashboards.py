"""Checks that the dashboards show something: asks a Prometheus every query of every panel.

    python -m tools.check_dashboards --prometheus http://127.0.0.1:9090 --run household

It lists the queries without data. A query has data if it gave a number at any moment of the newest
minutes, so the run may just have ended. It exits with 1 if a query has no data, or if Prometheus
cannot scrape one of the run's processes. It writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

DASHBOARDS = Path(__file__).resolve().parent.parent / "helm" / "dashboards"
_STEP_S = 15


@dataclass(frozen=True)
class Query:
    dashboard: str
    panel: str
    legend: str
    text: str

    def fill(self, run: str, *, window: str, seconds: int) -> str:
        """The query with values for the variables that Grafana replaces."""
        values = {"$__rate_interval": window, "$__range": f"{seconds}s", "$run": run, "$role": ".+"}
        text = self.text
        for name, value in values.items():
            text = text.replace(name, value)
        return text


def list_queries(folder: Path = DASHBOARDS) -> Iterator[Query]:
    """Every query of every panel, as written."""
    for path in sorted(folder.glob("*.json")):
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        for panel in dashboard["panels"]:
            # Rows are panels as well, without targets.
            for target in panel.get("targets", ()):
                yield Query(path.stem, panel["title"], target["legendFormat"], target["expr"])


def find_empty(
    prometheus: str, run: str, *, minutes: float = 30.0, window: str = "1m"
) -> list[Query]:
    """Queries that gave no number over the newest minutes.

    Raises:
        httpx.HTTPError: Prometheus cannot be reached, or does not take a query.
    """
    with httpx.Client(base_url=prometheus, timeout=30, trust_env=False) as client:
        seconds = int(60 * minutes)
        empty = []
        for query in list_queries():
            filled = query.fill(run, window=window, seconds=seconds)
            if not _has_number(_ask(client, filled, seconds)):
                empty.append(query)
        return empty


def find_down(prometheus: str, run: str) -> list[str]:
    """Processes of the run that Prometheus cannot scrape now; `no process` if it knows none."""
    with httpx.Client(base_url=prometheus, timeout=30, trust_env=False) as client:
        found = _ask(client, f'up{{run="{run}"}}', _STEP_S)
    if not found:
        return ["no process"]
    down = []
    for series in found:
        _, newest = series["values"][-1]
        if float(newest) != 1:
            down.append(str(series["metric"]))
    return down


def _ask(client: httpx.Client, query: str, seconds: int) -> list[dict[str, Any]]:
    now = time.time()
    form = {"query": query, "start": now - seconds, "end": now, "step": _STEP_S}
    answer = client.post("/api/v1/query_range", data=form)
    # Prometheus says in the body what is wrong with the query.
    if answer.status_code == httpx.codes.BAD_REQUEST:
        raise httpx.HTTPError(f"Prometheus does not take {query}: {answer.json()['error']}")
    answer.raise_for_status()
    return list(answer.json()["data"]["result"])


def _has_number(found: list[dict[str, Any]]) -> bool:
    """Whether any value is a number; Prometheus answers NaN for a share of nothing."""
    for series in found:
        if any(math.isfinite(float(value)) for _, value in series["values"]):
            return True
    return False


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", required=True, help="URL of Prometheus")
    parser.add_argument("--run", required=True, help="value of the label run")
    parser.add_argument("--minutes", type=float, default=30.0, help="how far to look back")
    parser.add_argument("--window", default="1m", help="what rates are taken over")
    parser.add_argument(
        "--allow-empty",
        action="append",
        default=[],
        metavar="PANEL",
        help="a panel that may show nothing",
    )
    return parser


def main() -> int:
    chosen = build_parser().parse_args()
    queries = list(list_queries())
    found = find_empty(chosen.prometheus, chosen.run, minutes=chosen.minutes, window=chosen.window)
    empty = [query for query in found if query.panel not in chosen.allow_empty]
    down = find_down(chosen.prometheus, chosen.run)

    for query in empty:
        print(f"no data: {query.dashboard} / {query.panel} / {query.legend}: {query.text}")
    for process in down:
        print(f"down: {process}")
    print(
        f"{len(queries)} queries, {len(empty)} without data, {len(down)} processes that do not "
        "answer."
    )
    return 1 if empty or down else 0


if __name__ == "__main__":
    sys.exit(main())
