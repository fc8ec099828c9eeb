"""OpenEnv's server of an environment that answers at once, the peer of ours: one uvicorn process.

python -m loadtest.instant_openenv PORT SESSIONS
"""

from __future__ import annotations

import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

from loadtest.instant import OBSERVATION


class Answer(Action):
    text: str


class Seen(Observation):
    text: str


class InstantOpenEnv(Environment[Answer, Seen, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: object) -> Seen:
        return Seen(text=OBSERVATION)

    def step(self, action: Answer, timeout_s: float | None = None, **_: object) -> Seen:
        return Seen(text=OBSERVATION, reward=0.0)

    @property
    def state(self) -> State:
        return State()


if __name__ == "__main__":
    app = create_fastapi_app(InstantOpenEnv, Answer, Seen, max_concurrent_envs=int(sys.argv[2]))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="critical")
