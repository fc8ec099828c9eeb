"""Which tokens end a response, and what follows them in a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar.contracts.errors import ConfigurationError
from sdar.model.template import TurnPieces
from sdar.model.tokenizer import list_added_tokens

_TEMPLATE = "the chat template"
_TOKENIZER = "the tokenizer's eos_token"
_GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class StopTokens:
    """What ends a response: the union of what template, tokenizer and generation_config.json name.

    Attributes:
        closing_id: the token with which the template closes an assistant's turn.
        sources: each stop token with who names it.
    """

    closing_id: int
    sources: Mapping[int, tuple[str, ...]]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(sorted(self.sources))


def find_stop_tokens(tokenizer: Any, turns: TurnPieces, model_path: Path) -> StopTokens:
    """The tokens that end a response of this model.

    Raises:
        ConfigurationError: the template closes a turn by no single token, or ordinary text is
            called an end.
    """
    closing_id = _find_closing(tokenizer, turns)
    named = [(closing_id, _TEMPLATE)]
    if tokenizer.eos_token_id is not None:
        named.append((int(tokenizer.eos_token_id), _TOKENIZER))
    named += [(i, _GENERATION) for i in _read_generation_config(model_path)]
    for token_id, source in named:
        _check_is_added(tokenizer, token_id, source)
    ids = sorted({token_id for token_id, _ in named})
    return StopTokens(closing_id, {i: tuple(s for j, s in named if j == i) for i in ids})


def _find_closing(tokenizer: Any, turns: TurnPieces) -> int:
    """The added token that the template writes behind an assistant's message, before any text.

    Where the turn is closed by what opens the next one (GLM-4's `<|user|>`), that is it.
    """
    found = list_added_tokens(tokenizer, turns.between)
    text = tokenizer.added_tokens_decoder[found[0]].content if found else None
    if text is None or turns.between.partition(text)[0].strip():
        raise ConfigurationError(
            f"The chat template closes an assistant's message with {turns.between!r}, which "
            "begins with no single token of this tokenizer that could end a response: the policy "
            "would go on to its length limit. Use the tokenizer that belongs to the template, or "
            "add the closing text to it as a special token."
        )
    return found[0]


def _read_generation_config(model_path: Path) -> list[int]:
    """The tokens that generation_config.json lets generation end with; none without the file."""
    file = model_path / _GENERATION
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ConfigurationError(f"{file} is not a JSON object: {error}. Repair it.") from error
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int for i in ids):
        raise ConfigurationError(
            f"eos_token_id in {file} is {found!r}. Give one token id, or a list of them."
        )
    return ids


def _check_is_added(tokenizer: Any, token_id: int, source: str) -> None:
    if token_id not in tokenizer.added_tokens_decoder:
        is_known = 0 <= token_id < len(tokenizer)
        text = tokenizer.convert_ids_to_tokens(token_id) if is_known else None
        what = "no token of this tokenizer" if text is None else f"ordinary text, {text!r}"
        raise ConfigurationError(
            f"{source} ends responses with token {token_id}, which is {what}. Correct it to the "
            "tokens that end a turn."
        )
