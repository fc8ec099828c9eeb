"""The chat template: fresh prompts, the tokens between a response and the next prompt, identity.

A multi-turn prompt is extended token by token, never rendered and tokenised anew: what the policy
sampled is trained on.
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
    """A model's tokenizer and chat template. Rendering is cached: environments repeat their
    sentences.
    """

    def __init__(self, model_path: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                str(model_path), trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"Cannot load a tokenizer from model.path {model_path}: {error}. Point it at a "
                "Hugging Face model directory, "
                "or make a tiny one with `sdar model create`."
            ) from error
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
        """Refuse a text from outside that cannot be a prompt of `max_tokens`, before time and
        memory are spent on it.

        Raises ContractError.
        """
        num_characters = sum(len(message.content) for message in messages)
        limit = _CHARACTERS_ALLOWANCE + _CHARACTERS_PER_TOKEN * max_tokens
        if num_characters > limit:
            raise ContractError(
                f"{num_characters} characters in {len(messages)} messages; for {max_tokens} tokens "
                f"at most {limit} are read. "
                "Shorten them.",
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
        ids.setflags(write=False)
        return ids

    def _render_fresh_uncached(self, messages: tuple[ChatMessage, ...]) -> TokenIds:
        return self._encode(self._template(messages, add_generation_prompt=True))

    def _render_delta_uncached(
        self, messages: tuple[ChatMessage, ...], is_closed: bool
    ) -> TokenIds:
        # A user message must precede: some templates refuse to begin with the assistant.
        before = (ChatMessage("user", "."), ChatMessage("assistant", _RESPONSE_MARK))
        text = self._template((*before, *messages), add_generation_prompt=True)
        _, mark, between = text.partition(_RESPONSE_MARK)
        if not mark:
            raise ConfigurationError(
                "The chat template rewrites the assistant's text, so a conversation cannot be "
                "extended token by token. "
                "Use a template that keeps assistant messages as they are."
            )
        eos = str(self.tokenizer.eos_token)
        if is_closed:
            _, found, between = between.partition(eos)
            if not found:
                raise ConfigurationError(
                    f"The chat template doesn't close an assistant message with {eos!r}, the "
                    "eos_token."
                )
        return self._encode(between)


def place_skills(messages: Sequence[ChatMessage], skill_text: str) -> tuple[ChatMessage, ...]:
    """The same messages with skills at the start of the first user message, hence behind the
    template's first tokens.

    ::

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
            "hold its skills. "
            "Let the first observation be a user message."
        )
    separator = "\n\n" if "\n" in skill_text else " "
    content = f"{skill_text}{separator}{messages[index].content}"
    return (*messages[:index], ChatMessage("user", content), *messages[index + 1 :])


@functools.cache
def compute_model_identity(model_path: Path) -> ModelIdentity:
    """Name and a hash over configuration, tokenizer and template files; weights are identified by
    their policy version.

    Raises:
        ConfigurationError: the directory is no model.
    """
    if not (model_path / "config.json").is_file():
        raise ConfigurationError(
            f"model.path {model_path} holds no config.json. Point it at a Hugging Face model "
            "directory, "
            "or make a tiny one with `sdar model create`."
        )
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        file = model_path / name
        digest.update(name.encode() + (file.read_bytes() if file.is_file() else b"-"))
    return ModelIdentity(model_path.name, digest.hexdigest()[:16])
