"""Recipes of tiny models: everything that decides a model's weights, and the digest over it.

Nothing is trained here; `sdar.cli.warm_start.making` does that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from sdar.contracts.errors import ConfigurationError
from sdar.model.chat import ChatTokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Places in SPECIAL_TOKENS, which come first in every vocabulary.
PAD_ID = 0
END_OF_TURN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPES = {
    "household": "sdar.cli.warm_start.household:HouseholdRecipe",
    "alfworld": "sdar.cli.warm_start.alfworld:AlfworldRecipe",
    "webshop": "sdar.cli.warm_start.webshop:WebshopRecipe",
    "search": "sdar.cli.warm_start.search:SearchRecipe",
}
"""Paths, not classes: an environment's optional dependencies are imported only where its model is
made.
"""

Example = list[tuple[list[int], bool]]
"""A conversation in token segments, each with whether the player wrote it."""


class Demonstrator(Protocol):
    """One environment's part of a warm start. It plays the training split only."""

    def list_phrases(self) -> Sequence[str]:
        """Texts that are one token each, wherever they stand. The rest of the vocabulary is learnt
        from sentences.
        """

    def iterate_sentences(self, rng: random.Random) -> Iterable[str]:
        """Texts that the tokenizer's vocabulary is learnt from."""

    def write(self, chat: ChatTokenizer, rng: random.Random, hinted_share: float) -> Example:
        """One example to imitate, in the tokens an agent sees and writes. `hinted_share`: chance
        that it shows a skill.
        """


@dataclass(frozen=True, slots=True)
class WarmStartPhase:
    """One run of the optimizer. `hinted_early` is the share of examples that show a skill in the
    first half of the updates, `hinted_late` in the second."""

    num_updates: int
    learning_rate: float
    hinted_early: float
    hinted_late: float


@dataclass(frozen=True)
class WarmStartRecipe(ABC):
    """Everything that decides the weights; an environment's recipe adds its demonstrator's odds.

    Attributes:
        environment: name of the environment it plays.
        code_version: raise it with any change to code that changes the model: caches are keyed by
            it.
        language_model_weight: weight of the loss over all tokens, observations included, beside
            that over the player's.
    """

    environment: ClassVar[str]
    code_version: ClassVar[int] = 1

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 2
    intermediate_size: int = 192
    max_positions: int = 1024
    vocabulary_limit: int = 640
    vocabulary_multiple: int = 64
    num_tokenizer_episodes: int = 4000
    batch_size: int = 32
    warmup_updates: int = 30
    final_learning_rate_share: float = 0.1
    adam_betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    language_model_weight: float = 0.3
    phases: tuple[WarmStartPhase, ...] = ()
    seed: int = 0

    @abstractmethod
    def open_demonstrator(self) -> Demonstrator:
        """The player to imitate."""

    @abstractmethod
    def describe_wording(self) -> list[Any]:
        """What the demonstrations say, as far as it can change under the same recipe; JSON."""

    @property
    def num_updates(self) -> int:
        return sum(phase.num_updates for phase in self.phases)

    @property
    def model_name(self) -> str:
        return f"{self.environment}-tiny"

    @property
    def digest(self) -> str:
        """Hex sha256 over the recipe, its code's version and the demonstrations' wording: equal
        digests mean the same model.
        """
        content = [
            dataclasses.asdict(self),
            self.code_version,
            CHAT_TEMPLATE,
            self.describe_wording(),
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What a model directory keeps of its recipe: schedule and seed last, behind what an
        environment adds.
        """
        fields = dataclasses.asdict(self)
        # Fields of a subclass stand behind those that it inherits.
        for name in ("phases", "seed"):
            fields[name] = fields.pop(name)
        return {"digest": self.digest, "code_version": self.code_version, "recipe": fields}


def load_recipe(environment: str) -> WarmStartRecipe:
    """The default recipe of an environment's tiny model.

    Raises:
        ConfigurationError: there is no recipe for it, or what its environment needs is not
            installed.
    """
    if environment not in RECIPES:
        raise ConfigurationError(
            f"No tiny model is known for environment {environment!r}. Use one of "
            f"{', '.join(RECIPES)}."
        )
    module_name, _, class_name = RECIPES[environment].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigurationError(
            f"Environment {environment!r} cannot be imported: {error}. Install what it needs."
        ) from error
    recipe: WarmStartRecipe = getattr(module, class_name)()
    return recipe
