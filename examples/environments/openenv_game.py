"""A game on OpenEnv's own server, trained on without a line of code for sdar.

Needs openenv-core.

python examples/environments/openenv_game.py 8123 &
sdar env serve openenv --option url=http://127.0.0.1:8123 --capacity 16
"""

from __future__ import annotations

import random
import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

MAX_SESSIONS = 16
LARGEST = 30


class Guess(Action):
    guess: str


class Hint(Observation):
    hint: str


class GuessingGame(Environment[Guess, Hint, State]):
    """Find the number the seed hides."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: object) -> Hint:
        self._number, self._state = (
            random.Random(seed).randint(1, LARGEST),
            State(episode_id=episode_id),
        )
        return Hint(hint=f"I think of a number from 1 to {LARGEST}. Which?")

    def step(self, action: Guess, timeout_s: float | None = None, **_: object) -> Hint:
        self._state.step_count += 1
        if not action.guess.isdecimal():
            return Hint(hint="That is no number.", reward=0.0)
        if int(action.guess[:9]) == self._number:
            return Hint(hint="Yes!", reward=1.0, done=True)
        return Hint(
            hint="Too low." if int(action.guess[:9]) < self._number else "Too high.", reward=0.0
        )

    @property
    def state(self) -> State:
        return self._state


if __name__ == "__main__":
    app = create_fastapi_app(GuessingGame, Guess, Hint, max_concurrent_envs=MAX_SESSIONS)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
