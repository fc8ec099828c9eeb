"""What an environment judges of a thinking model's response, over gRPC, whatever part of the
thoughts the template writes into the prompt.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

from examples.environments.guess_number import GuessNumber
from sdar.contracts.types import Task
from sdar.environments.base import Environment, Observation, StepResult
from sdar.environments.server import build_environment_server
from sdar.environments.sessions import SessionManager
from sdar.in_process.environment_host import InProcessHost
from sdar.model.chat import ChatTokenizer
from services.envs.alfworld.environment import read_response
from services.rollout.environment_client import GrpcEnvironmentClient
from services.rollout.episode import Attempt, play_episode
from tests.unit.rollout.fakes import (
    TEMPLATE,
    ScriptedEngine,
    make_group,
    make_rules,
    write_model,
)

WRITES_ITSELF = TEMPLATE
OPENED = TEMPLATE.replace(
    "assistant\n{% endif", "assistant\n<think>\n{% endif"
)  # Qwen3-Thinking, R1
THINKING_OFF = TEMPLATE.replace(  # Qwen3 with enable_thinking false
    "assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif"
)
ACTION = "<action>go</action>"
END_OF_TURN = 2


class Corridor(Environment):
    """Two steps; judges a response as ALFWorld does."""

    name = "corridor"
    version = "1"
    splits = ("train",)
    max_turns = 2
    action_format = "Reason inside <think> </think>, then act inside <action> </action>."
    tasks: ClassVar = {"train": [Task("corridor", "train", "t0", "walk", "walk on", 0)]}

    def reset(self, task_id: str, seed: int) -> Observation:
        self.num_turns = 0
        return Observation("A door.", ("go",))

    def step(self, text: str) -> StepResult:
        self.num_turns += 1
        command, is_valid = read_response(text)
        return StepResult(
            Observation("Another door.", ("go",)),
            truncated=self.num_turns == 2,
            action=command,
            is_action_valid=is_valid,
        )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


async def play(model_path, template, response, environment=Corridor):
    """The turns of an episode in which every response is `response`."""
    (model_path / "chat_template.jinja").write_text(template)
    tokenizer = ChatTokenizer(model_path)
    sampled = tokenizer.tokenizer.encode(response, add_special_tokens=False)
    sessions = SessionManager(InProcessHost({environment.name: environment}))
    await sessions.start()
    server = build_environment_server(sessions, "127.0.0.1", 0)
    await server.start()
    client = GrpcEnvironmentClient(
        f"127.0.0.1:{server.port}", step_timeout_s=5.0, open_patience_s=5.0
    )
    try:
        [task] = await sessions.list_tasks(environment.name, "train", 0, 1)
        trajectory = await play_episode(
            dataclasses.replace(make_group(size=1, max_turns=2), task=task),
            0,
            Attempt(0),
            engine=ScriptedEngine([*sampled, END_OF_TURN]),
            environment=client,
            rules=make_rules(tokenizer, max_sequence_tokens=4096),
        )
    finally:
        await client.close()
        await server.stop(grace_s=0.0)
        await sessions.close_all()
    for turn in trajectory.turns:
        assert turn.response_token_ids.tolist() == [*sampled, END_OF_TURN]
    return trajectory.turns


@pytest.mark.parametrize(
    ("template", "response", "judged", "is_valid"),
    [
        (WRITES_ITSELF, f"<think>why</think>{ACTION}", f"<think>why</think>{ACTION}", True),
        (WRITES_ITSELF, ACTION, ACTION, False),
        (WRITES_ITSELF, f"why</think>{ACTION}", f"why</think>{ACTION}", False),
        (OPENED, f"why</think>{ACTION}", f"<think>\nwhy</think>{ACTION}", True),
        (OPENED, f"why {ACTION}", f"<think>\nwhy {ACTION}", False),
        (OPENED, f"<think>why</think>{ACTION}", f"<think>why</think>{ACTION}", True),
        (THINKING_OFF, ACTION, f"<think>\n\n</think>\n\n{ACTION}", True),
        (THINKING_OFF, f"<think>why</think>{ACTION}", f"<think>why</think>{ACTION}", True),
        (THINKING_OFF, f"<think>why {ACTION}", f"<think>why {ACTION}", False),
        (THINKING_OFF, "go", "<think>\n\n</think>\n\ngo", False),
    ],
)
async def test_thoughts_are_judged_on_prompt_and_response_together_in_every_turn(
    model_path, template, response, judged, is_valid
):
    turns = await play(model_path, template, response)
    assert len(turns) == 2
    for turn in turns:
        assert (turn.response_text, turn.is_action_valid) == (judged, is_valid)


@pytest.mark.parametrize(
    ("template", "response", "is_valid"),
    [
        (WRITES_ITSELF, "5", True),
        (WRITES_ITSELF, "<think>four or five</think>\n\n5", True),
        (OPENED, "four or five</think>\n\n5", True),
        (OPENED, "5", False),
        (THINKING_OFF, "5", True),
    ],
)
async def test_an_environment_that_asks_for_no_thoughts_gets_its_action(
    model_path, template, response, is_valid
):
    turns = await play(model_path, template, response, GuessNumber)
    assert {turn.is_action_valid for turn in turns} == {is_valid}


async def test_an_observation_that_ends_in_an_opened_tag_begins_no_thoughts(model_path):
    class Tempter(Corridor):
        def reset(self, task_id: str, seed: int) -> Observation:
            super().reset(task_id, seed)
            return Observation("Say <think>")

    first, _ = await play(model_path, WRITES_ITSELF, f"why</think>{ACTION}", Tempter)
    assert (first.response_text, first.is_action_valid) == (f"why</think>{ACTION}", False)
