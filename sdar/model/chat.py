"""Makes prompts of chat messages by a model's tokenizer and chat template.

A prompt of several turns is extended token by token and never rendered and tokenised anew, since
the text of a response may be tokenised into other tokens than the policy sampled, and those it
sampled are trained on.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdar.contracts.errors import ConfigurationError, ContractError
from sdar.contracts.types import ChatMessage, ModelIdentity, TokenIds

# Any text that no template contains; it marks where the response stands in a rendered conversation.
_RESPONSE_MARK = "\u2060response\u2060"
# Tokenising takes seconds and gigabytes for tens of megabytes of text. The tokens of a long text
# are shorter than this on average; the allowance is for tokenizers that read a known sentence as
# one token.
_CHARACTERS_PER_TOKEN = 16
_CHARACTERS_ALLOWANCE = 1 << 20


class ChatTokenizer:
    """A model's tokenizer and chat template.

    Rendering is cached, since environments repeat their sentences.
    """

    def __init__(self, model_path: Path) -> None:
        self.tokenizer = _load_tokenizer(model_path)
        if not self.tokenizer.chat_template:
            raise ConfigurationError(
                f"The tokenizer in {model_path} has no chat template. Use an instruction-tuned "
                "model's."
            )
        if self.tokenizer.eos_token_id is None:
            raise ConfigurationError(
                f"The tokenizer in {model_path} names no eos_token, so no response could end. Set "
                "one."
            )
        self._render_fresh = functools.lru_cache(maxsize=4096)(self._render_fresh_uncached)
        self._render_delta = functools.lru_cache(maxsize=4096)(self._render_delta_uncached)

    @property
    def eos_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @functools.cached_property
    def template_hash(self) -> str:
        """Identity of the chat template: scores under different templates cannot be compared."""
        return hashlib.sha256(self.tokenizer.chat_template.encode()).hexdigest()[:16]

    def check_size(self, messages: Sequence[ChatMessage], max_tokens: int) -> None:
        """Refuse a text from outside that is too long for a prompt of `max_tokens`.

        Asked before time and memory are spent on tokenising it.

        Raises:
            ContractError: it is too long.
        """
        num_characters = sum(len(message.content) for message in messages)
        limit = _CHARACTERS_ALLOWANCE + _CHARACTERS_PER_TOKEN * max_tokens
        if num_characters > limit:
            raise ContractError(
                f"{num_characters} characters in {len(messages)} messages; for {max_tokens} tokens "
                f"at most {limit} are read. Shorten them.",
                limit=limit,
            )

    def render_fresh(self, messages: Sequence[ChatMessage]) -> TokenIds:
        """Token ids [P] of a whole prompt that asks the assistant for its next message."""
        return self._render_fresh(tuple(messages))

    def render_delta(self, messages: Sequence[ChatMessage], *, is_closed: bool) -> TokenIds:
        """Token ids between a sampled response and the following response.

        Args:
            messages: what came in between, usually one user message with the observation.
            is_closed: the response ended with the end-of-turn token; otherwise (cut at its length
                limit) the token is added.
        """
        return self._render_delta(tuple(messages), is_closed)

    def decode_response(self, token_ids: Sequence[int] | TokenIds) -> str:
        """Text of a response without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _template(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        return str(
            self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _encode(self, text: str) -> TokenIds:
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
        # The cache hands one array to many callers.
        ids.setflags(write=False)
        return ids

    def _render_fresh_uncached(self, messages: tuple[ChatMessage, ...]) -> TokenIds:
        return self._encode(self._template(messages, add_generation_prompt=True))

    def _render_delta_uncached(
        self, messages: tuple[ChatMessage, ...], is_closed: bool
    ) -> TokenIds:
        # A conversation is rendered whose response is a mark, and cut behind it: what is left are
        # the end of the response and the new messages, as the template writes them.
        # A user message must precede: some templates refuse to begin with the assistant.
        before = (ChatMessage("user", "."), ChatMessage("assistant", _RESPONSE_MARK))
        text = self._template((*before, *messages), add_generation_prompt=True)
        _, mark, between = text.partition(_RESPONSE_MARK)
        if not mark:
            raise ConfigurationError(
                "The chat template rewrites the assistant's text, so a conversation cannot be "
                "extended token by token. Use a template that keeps assistant messages as they "
                "are."
            )
        return self._encode(self._cut_closing(between) if is_closed else between)

    def _cut_closing(self, between: str) -> str:
        """What follows the end-of-turn token, which a closed response has sampled itself."""
        eos = str(self.tokenizer.eos_token)
        _, found, rest = between.partition(eos)
        if not found:
            raise ConfigurationError(
                f"The chat template doesn't close an assistant message with {eos!r}, the eos_token."
            )
        return rest


def list_ordinary_tokens(model_path: Path) -> list[int]:
    """Ids of the tokens that stand for text, without those that control a conversation."""
    tokenizer = _load_tokenizer(model_path)
    return sorted(set(range(len(tokenizer))) - set(tokenizer.added_tokens_decoder))


def _load_tokenizer(model_path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"Cannot load a tokenizer from model.path {model_path}: {error}. Point it at a "
            "Hugging Face model directory, or make a tiny one with `sdar model create`."
        ) from error


def place_skills(messages: Sequence[ChatMessage], skill_text: str) -> tuple[ChatMessage, ...]:
    """The same messages with skills at the start of the first user message.

    Hence they stand behind the template's first tokens::

        <|im_start|>user\\n{skill_text} {content}<|im_end|>\\n
        <|im_start|>user\\n{skill_text}\\n\\n{content}<|im_end|>\\n

    Skills of one line (above) are parted from the content by a space, longer ones by an empty line.
    Empty `skill_text` changes nothing: no header, no separator.

    Raises:
        ContractError: there are skills and no user message to hold them.
    """
    if not skill_text:
        return tuple(messages)
    index = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if index is None:
        raise ContractError(
            f"A prompt of roles {[message.role for message in messages]} has no user message to "
            "hold its skills. Let the first observation be a user message."
        )
    separator = "\n\n" if "\n" in skill_text else " "
    content = f"{skill_text}{separator}{messages[index].content}"
    return (*messages[:index], ChatMessage("user", content), *messages[index + 1 :])


@functools.cache
def compute_model_identity(model_path: Path) -> ModelIdentity:
    """Name of a model, and a hash over its configuration, tokenizer and template files.

    Weights are no part of it: their policy version identifies them.

    Raises:
        ConfigurationError: the directory is no model.
    """
    if not (model_path / "config.json").is_file():
        raise ConfigurationError(
            f"model.path {model_path} holds no config.json. Point it at a Hugging Face model "
            "directory, or make a tiny one with `sdar model create`."
        )
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        file = model_path / name
        # A file that is not there counts, too: the template may stand in a file of its own or not.
        digest.update(name.encode() + (file.read_bytes() if file.is_file() else b"-"))
    return ModelIdentity(model_path.name, digest.hexdigest()[:16])
