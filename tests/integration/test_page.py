"""The gateway's page, its own script run by Node on a small document that refuses markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import services.gateway.app

PAGE = Path(services.gateway.app.__file__).parent / "web" / "index.html"
HOSTILE = "<script>alert(1)</script>"

# A document whose elements take text only: whatever would parse markup throws.
DOCUMENT = """
const markup = () => { throw new Error("markup was written"); };
class Element {
  constructor() { this.children = []; this.text = ""; this.attributes = {}; }
  set textContent(value) { this.text = String(value); this.children = []; }
  set innerHTML(value) { markup(); }
  set outerHTML(value) { markup(); }
  insertAdjacentHTML() { markup(); }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; }
  setAttribute(name, value) { this.attributes[name] = value; }
  show() {
    return this.text + this.children.map(c => c instanceof Element ? c.show() : c).join(" ");
  }
}
const elements = {};
globalThis.document = {
  getElementById: id => elements[id] ??= new Element(),
  createElement: () => new Element(), createElementNS: () => new Element(), write: markup,
};
globalThis.sessionStorage = { getItem: () => null, setItem: () => {} };
globalThis.setTimeout = () => {};
globalThis.fetch = async path => {
  const body = answers[Object.keys(answers).find(start => path.startsWith(start))];
  return { ok: true, status: 200, json: async () => body };
};
process.on("exit", () => {
  const shown = Object.entries(elements).map(([id, element]) => [id, element.show()]);
  console.log(JSON.stringify(Object.fromEntries(shown)));
});
const settled = () => new Promise(resolve => setImmediate(resolve));
(async () => {
  for (let i = 0; i < 50; i++) await settled();
  for (const link of elements.trajectories.children) if (link.onclick) await link.onclick();
})();
"""

RUN = {
    "run_id": "demo",
    "method": "sdar",
    "phase": "running",
    "detail": "",
    "num_updates": 3,
    "target_updates": 10,
    "policy_version": 4,
    "instances": {"rollout": 1},
    "bus": {"state": "full"},
    "figures": {
        "success_mean": 0.95,
        "num_episodes": 320,
        "trained_success_mean": 0.85,
        "num_trajectories": 128,
    },
    "alarms": [{"name": "redis_full", "message": HOSTILE}],
    "evaluations": [],
    "ledger": {
        "issued": 9,
        "running": 2,
        "generated": 7,
        **{"trained": 3, "skipped": 1, "stale": 1, "failed": 0, "cancelled": 0, "buffered": 1},
    },
    "ledger_gap": 1,
    "ledger_gap_ids": ["group-00000005"],
}
TURN = {
    "messages": [{"role": "user", "content": HOSTILE}],
    "response_text": HOSTILE,
    "reward": 1,
    "policy_versions": [0, 0],
}


def show_page(answers: dict[str, Any]) -> dict[str, str]:
    """Text of each element of the page by id, after a refresh and a click on each trajectory."""
    if shutil.which("node") is None:
        pytest.fail(
            "The test of the page needs Node.js. Install Node.js 18 or later, "
            "then run this test again."
        )
    script = re.search(r"<script>(.*)</script>", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert script is not None
    program = f"const answers = {json.dumps(answers)};\n{DOCUMENT}\n{script[1]}"
    done = subprocess.run(
        ["node", "-e", program], capture_output=True, text=True, timeout=60, check=True
    )
    shown: dict[str, str] = json.loads(done.stdout)
    return shown


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    return show_page(
        {
            "/v1/run": RUN,
            "/v1/metrics": [
                {
                    "entry_id": "1-0",
                    "service": "learner",
                    "values": {"success_mean": 0.5, "loss": None},
                }
            ],
            "/v1/trajectories?": [HOSTILE],
            "/v1/trajectories/": {"task": {"description": HOSTILE}, "turns": [TURN]},
        }
    )


def test_a_script_in_an_observation_is_shown_as_text(shown: dict[str, str]) -> None:
    assert shown["error"] == ""
    assert shown["trajectory"].count(HOSTILE) == 3
    assert HOSTILE in shown["trajectories"]


def test_both_equations_the_gap_and_the_alarms_are_shown(shown: dict[str, str]) -> None:
    assert shown["issued"] == "issued 9 = running 2 + generated 7"
    assert (
        shown["generated"]
        == "generated 7 = trained 3 + skipped 1 + stale 1 + failed 0 + cancelled 0 + buffered 1"
    )
    assert "group-00000005" in shown["gap"]
    assert shown["alarms"] == f"redis_full: {HOSTILE}"
    assert "Redis full" in shown["summary"]
    told = "success in training 0.950 of 320 played, 0.850 of 128 trained"
    assert shown["success"] == told
