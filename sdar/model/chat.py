"""Makes prompts of chat messages by a model's tokenizer and chat template.

A prompt of several turns is extended token by token and never rendered and tokenised anew, since
the text of a response may be tokenised into other tokens than the policy sampled, and those it
sampled are trained on.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdar.config import TEMPLATE_DATE
from sdar.contracts.errors import ConfigurationError, ContractError
from sdar.contracts.types import ChatMessage, ModelIdentity, TokenIds
from sdar.model.stops import find_stop_tokens
from sdar.model.template import ChatTemplate, mark_text
from sdar.model.tokenizer import (
    TextEncoder,
    check_round_trip,
    decode_text,
    list_added_tokens,
    load_tokenizer,
)

# Tokenising takes seconds and gigabytes for tens of megabytes of text. The tokens of a long text
# are shorter than this on average; the allowance is for tokenizers that read a known sentence as
# one token.
_CHARACTERS_PER_TOKEN = 16
_CHARACTERS_ALLOWANCE = 1 << 20

_IDENTIFYING_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What decides how prompts are rendered and where responses end."""


class ChatTokenizer:
    """A model's tokenizer and chat template.

    Rendering is cached, since environments repeat their sentences. Texts of control tokens in
    messages stay text, see `sdar.model.tokenizer`.

    Args:
        date: what a template shows that writes today's date.

    Raises:
        ConfigurationError: prompts of this model would not be what it was trained on.
            `sdar.model.chat_check` lists all that is wrong.
    """

    def __init__(self, model_path: Path, date: datetime.date = TEMPLATE_DATE) -> None:
        self.tokenizer = load_tokenizer(model_path)
        check_round_trip(self.tokenizer)
        self.template = ChatTemplate(self.tokenizer, date)
        self.stops = find_stop_tokens(self.tokenizer, self.template.turns, model_path)
        self._date = date
        self.control_ids = self._find_control_ids()
        self._encoder = TextEncoder(self.tokenizer, self.control_ids, self.stops.closing_id)
        self._render_fresh = functools.lru_cache(maxsize=4096)(self._render_fresh_uncached)
        self._render_delta = functools.lru_cache(maxsize=4096)(self._render_delta_uncached)

    @functools.cached_property
    def template_hash(self) -> str:
        """Identity of the chat template: scores under different templates cannot be compared."""
        date = self._date.isoformat() if self.template.reads_clock else ""
        return hashlib.sha256((self.template.text + date).encode()).hexdigest()[:16]

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

    def count_controls(self, texts: Iterable[str]) -> int:
        """How many texts of control tokens stand in these texts, which a prompt keeps as text."""
        return self._encoder.count_controls(texts)

    def render_fresh(self, messages: Sequence[ChatMessage]) -> TokenIds:
        """Token ids [P] of a whole prompt that asks the assistant for its next message.

        Raises:
            ContractError: the chat template refuses these messages.
        """
        return self._render_fresh(tuple(messages))

    def render_delta(self, messages: Sequence[ChatMessage], *, ended_by: int | None) -> TokenIds:
        """Token ids between a sampled response and the following response.

        Args:
            messages: what came in between, usually one user message with the observation.
            ended_by: the stop token with which the response ended; None if it was cut at its length
                limit. What the template writes up to this token is left out, for it was sampled.
                Behind a stop token that the template does not write (Qwen's `<|endoftext|>`), the
                turn is closed as behind a response that was cut.

        Raises:
            ContractError: the chat template refuses these messages.
        """
        return self._render_delta(tuple(messages), ended_by)

    def decode_response(self, token_ids: Sequence[int] | TokenIds) -> str:
        """Text of a response without special tokens, and without the stop token at its end."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stops.sources:
            # It need not be one that the tokenizer calls special.
            ids.pop()
        return decode_text(self.tokenizer, ids)

    def _find_control_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        special = {token_id for token_id, token in added.items() if token.special}
        turns = self.template.turns
        pieces = (turns.head, turns.answer, turns.between, turns.tail)
        between = {i for piece in pieces for i in list_added_tokens(self.tokenizer, piece)}
        return frozenset(special | between).union(self.stops.ids)

    def _render_fresh_uncached(self, messages: tuple[ChatMessage, ...]) -> TokenIds:
        cut = self._encoder.cut(messages)
        return self._encoder.encode(self.template.render(cut.messages), cut.mark)

    def _render_delta_uncached(
        self, messages: tuple[ChatMessage, ...], ended_by: int | None
    ) -> TokenIds:
        # A conversation is rendered whose response is a mark, and cut behind it: what is left are
        # the end of the response and the new messages, as the template writes them.
        # A user message must precede: some templates refuse to begin with the assistant.
        response = mark_text("response")
        before = (ChatMessage("user", "."), ChatMessage("assistant", response))
        cut = self._encoder.cut(messages)
        text = self.template.render((*before, *cut.messages))
        # The first one is the response; an observation that holds the mark comes later.
        _, _, rest = text.partition(response)
        sampled = self._find_sampled(ended_by)
        if not rest.startswith(sampled):
            raise ContractError(
                f"The chat template closes a response with {rest[: len(sampled)]!r} before these "
                f"messages, and otherwise with {sampled!r}. Let one user message follow a response."
            )
        return self._encoder.encode(rest[len(sampled) :], cut.mark, is_start=False)

    def _find_sampled(self, ended_by: int | None) -> str:
        """The part of what stands behind a response that it has sampled itself."""
        between = self.template.turns.between
        if ended_by is None or ended_by not in self.stops.sources:
            return ""
        before, found, _ = between.partition(self.tokenizer.added_tokens_decoder[ended_by].content)
        return before + found if found else ""


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
    folder = model_path / "additional_chat_templates"
    others = sorted(file.relative_to(model_path).as_posix() for file in folder.glob("*.jinja"))
    for name in (*_IDENTIFYING_FILES, *others):
        file = model_path / name
        # A file that is not there counts, too: the template may stand in a file of its own or not.
        digest.update(name.encode() + (file.read_bytes() if file.is_file() else b"-"))
    return ModelIdentity(model_path.name, digest.hexdigest()[:16])
