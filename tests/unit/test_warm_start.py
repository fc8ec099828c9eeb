"""The shipped model and the recipe that makes it.

The figures are success shares on the household's held-out tasks.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

from sdar.cli.warm_start.household import HouseholdRecipe
from sdar.cli.warm_start.making import create_model, train_tokenizer
from sdar.cli.warm_start.recipe import WarmStartPhase
from sdar.contracts.types import ChatMessage
from sdar.environments.base import StepResult
from sdar.model.chat import ChatTokenizer, place_skills
from services.envs.household import HouseholdEnvironment
from services.envs.household.demonstrations import skill_wording
from services.envs.household.game import PROCEDURES, TASK_TYPES

SHIPPED = Path(__file__).parents[2] / "examples/models/household-tiny"
TINY = HouseholdRecipe(
    hidden_size=16,
    intermediate_size=16,
    num_heads=1,
    num_tokenizer_episodes=200,
    batch_size=2,
    phases=(WarmStartPhase(3, 1e-3, 0.5, 0.5),),
)
MAX_ACTION_TOKENS = 10


class Player:
    """Plays many held-out tasks at once, turn by turn, with the model's own `generate`."""

    def __init__(self, model_dir: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_dir, padding_side="left"
        )
        self.model = Qwen2ForCausalLM.from_pretrained(model_dir).eval()

    def success(self, num_tasks: int, *, hint: str = "none", is_greedy: bool = False) -> float:
        """Share of the first `num_tasks` held-out tasks solved.

        `hint` is none, right, or wrong (another type's skill).
        """
        tasks = HouseholdEnvironment().list_tasks("heldout")[:num_tasks]
        games = [HouseholdEnvironment() for _ in tasks]
        talks = []
        for task, game in zip(tasks, games, strict=True):
            observation = ChatMessage("user", game.reset(task.task_id, task.seed).text)
            (message,) = place_skills((observation,), skill_text(task.task_type, hint))
            talks.append([{"role": message.role, "content": message.content}])
        results: dict[int, StepResult] = {}
        while len(results) < len(games):
            playing = [index for index in range(len(games)) if index not in results]
            for index, action in zip(
                playing, self._answer([talks[i] for i in playing], is_greedy), strict=True
            ):
                result = games[index].step(action)
                talks[index] += [
                    {"role": "assistant", "content": action},
                    {"role": "user", "content": result.observation.text},
                ]
                if result.is_over:
                    results[index] = result
        return sum(result.is_success for result in results.values()) / len(tasks)

    def _answer(self, talks: list[list[dict[str, str]]], is_greedy: bool) -> list[str]:
        prompts = self.tokenizer.apply_chat_template(
            talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        sampling = (
            {"do_sample": False}
            if is_greedy
            else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        )
        with torch.inference_mode():
            output = self.model.generate(**prompts, max_new_tokens=MAX_ACTION_TOKENS, **sampling)
        return self.tokenizer.batch_decode(
            output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
        )


def skill_text(task_type: str, hint: str) -> str:
    if hint == "none":
        return ""
    if hint == "wrong":
        task_type = TASK_TYPES[(TASK_TYPES.index(task_type) + 1) % len(TASK_TYPES)]
    return skill_wording(task_type, PROCEDURES[task_type])


@pytest.fixture(autouse=True)
def _one_seeded_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(num_threads)


def test_the_shipped_model_is_the_default_recipes():
    assert (SHIPPED / "recipe.json").read_text() == json.dumps(
        HouseholdRecipe().to_json(), indent=2
    ) + "\n"


def test_the_default_recipe_makes_the_shipped_tokenizer_byte_for_byte(tmp_path):
    recipe = HouseholdRecipe()
    train_tokenizer(recipe, recipe.open_demonstrator()).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_the_first_demonstrations_are_those_of_the_shipped_model():
    """The weights follow from them; the slow test below makes them.

    The hash was taken when the model was shipped.
    """
    demonstrator = HouseholdRecipe().open_demonstrator()
    chat = ChatTokenizer(SHIPPED)
    rng = random.Random(1)
    examples = [demonstrator.write(chat, rng, 0.85) for _ in range(32)]
    assert hashlib.sha256(repr(examples).encode()).hexdigest().startswith("0fe0978b0442a6c0")


def test_the_shipped_model_is_float32_qwen2_that_ends_turns_with_im_end():
    model = Qwen2ForCausalLM.from_pretrained(SHIPPED)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert model.dtype == torch.float32
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert len(tokenizer) <= model.config.vocab_size


def test_the_chat_template_writes_chatml_and_any_text_survives_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    messages = [{"role": "user", "content": "skill é 世"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nskill é 世<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_shipped_model_plays_badly_alone_and_well_with_the_skill():
    player = Player(SHIPPED)
    assert 0.08 < player.success(120) < 0.35
    assert player.success(120, hint="right") > 0.9
    assert player.success(120, hint="wrong") < 0.1


def test_a_model_is_made_once_and_whole(tmp_path):
    reports = []
    made = create_model(TINY, tmp_path, progress=lambda *report: reports.append(report))
    assert [(done, total) for done, total, _ in reports] == [(1, 3), (2, 3), (3, 3)]
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert create_model(TINY, tmp_path) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    assert [entry.name for entry in tmp_path.iterdir()] == [made.name]


def test_equal_recipes_make_equal_weights(tmp_path):
    first, second = (create_model(TINY, tmp_path / name) / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_a_failure_leaves_nothing_behind(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_model(TINY, tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_another_hyperparameter_is_another_model():
    assert HouseholdRecipe(seed=1).digest != HouseholdRecipe().digest


@pytest.mark.slow
def test_the_default_recipe_gives_the_base_figures_in_minutes(tmp_path):
    """No skill: 0.20 sampled, 0.11 greedy (0.08 is the type without a procedure).

    The right skill: 0.99. A wrong one: 0.00.
    """
    began_s = time.process_time()
    made = create_model(HouseholdRecipe(), tmp_path)
    assert time.process_time() - began_s < 400
    assert (made / "model.safetensors").read_bytes() == (SHIPPED / "model.safetensors").read_bytes()
    player = Player(made)
    assert player.success(360) == pytest.approx(0.20, abs=0.08)
    assert 0.05 < player.success(360, is_greedy=True) < 0.33
    assert player.success(360, hint="right") > 0.95
    assert player.success(360, hint="wrong") < 0.03
