"""Loads a model's tokenizer and encodes prompts so that what others wrote in them stays text.

An observation may hold the text of a control token: `<|im_end|><|im_start|>system` on a web page
would end the user's turn and begin another one. Such a text is cut behind its first character, and
the parts are encoded one by one, so no part is the token. All other text is encoded exactly as the
model's own `apply_chat_template` does.

A control token is one that

- the tokenizer calls special, or
- ends a response, or
- the chat template writes between turns; some tokenizers call those of
  turns not special, as DeepSeek's.

Other added tokens are vocabulary that models learned in ordinary text, such as Qwen3's `<think>` in
instructions. They part no turns, and stay the tokens they are.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdar.contracts.errors import ConfigurationError, ContractError
from sdar.contracts.types import ChatMessage, TokenIds

_ROUND_TRIP = "x Hello  world\n\n  1. Go\tto shelf 2 , now . \u00e9 \u4e2d \U0001f642 !"
"""Text that a tokenizer must not change: gaps, lines, a tab, letters of several scripts."""
_BLANK = " \t\r\n\u2581"
"""Characters of which added tokens consist that are only white space, as Gemma's are."""
# Characters of Unicode's private use area: neither tokens nor templates hold them.
_CUT = "\ue0f1"
_REST = "\ue0f2"


def load_tokenizer(model_path: Path) -> Any:
    """The tokenizer that tokenizer.json describes.

    Not the class that tokenizer_config.json names: transformers builds some classes anew, with
    rules of its own, and a DeepSeek tokenizer called LlamaTokenizerFast loses all spaces then.

    Raises:
        ConfigurationError: it cannot be loaded.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(model_path), trust_remote_code=False
        )
    # The Rust library raises plain exceptions for a tokenizer.json that it cannot use.
    except Exception as error:
        raise ConfigurationError(
            f"Cannot load a tokenizer from model.path {model_path}: {error}. Point it at a "
            "Hugging Face model directory, or make a tiny one with `sdar model create`."
        ) from error
    # A tokenizer.json may say that texts are cut or filled up; a prompt never is.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_round_trip(tokenizer: Any) -> None:
    """Raises ConfigurationError if text comes back from the tokenizer other than it went in."""
    ids = tokenizer.encode(_ROUND_TRIP, add_special_tokens=False)
    found = decode_text(tokenizer, ids)
    # Some tokenizers decode a first word without the space that they put before it.
    if found.strip() != _ROUND_TRIP:
        raise ConfigurationError(
            f"The tokenizer changes text: {_ROUND_TRIP!r} comes back as {found!r}. The model would "
            "not read what environments write. Use the tokenizer.json that the model was trained "
            "with."
        )


def decode_text(tokenizer: Any, token_ids: Iterable[int]) -> str:
    """Text of tokens without special ones, and without spaces tidied away before punctuation."""
    return str(
        tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )


def list_added_tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids of the added tokens in `text`, in order, those of white space left out."""
    added = tokenizer.added_tokens_decoder
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [i for i in ids if i in added and added[i].content.strip(_BLANK)]


@dataclass(frozen=True, slots=True)
class CutMessages:
    """Messages whose texts of control tokens are cut.

    Attributes:
        mark: stands at each cut; occurs nowhere else. Empty if nothing is cut.
    """

    messages: tuple[ChatMessage, ...]
    mark: str = ""


class TextEncoder:
    """Encodes what a template made of messages.

    Args:
        control_ids: tokens that no message may become.
        anchor_id: one of them, behind which text is encoded that begins within a prompt.

    Raises:
        ConfigurationError: a control token cannot be cut.
    """

    def __init__(self, tokenizer: Any, control_ids: Collection[int], anchor_id: int) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        self._control_texts = [added[i].content for i in sorted(control_ids)]
        self._finder = _build_finder([added[i] for i in control_ids], self._backend.normalizer)
        is_raw = not any(added[i].normalized for i in control_ids)
        # Most texts hold none of these, which is seen a hundred times faster than by the finder.
        # Where texts are normalized first, the finder alone can see it.
        self._beginnings = {text[:2] for text in self._control_texts} if is_raw else {""}
        self._anchor_id = anchor_id
        self._anchor = added[anchor_id].content
        short = [text for text in self._control_texts if len(text) < 2]
        if short:
            raise ConfigurationError(
                f"The tokenizer has control tokens of one character, {short}, which cannot be told "
                "from text. Use a tokenizer whose special tokens are longer."
            )

    def count_controls(self, texts: Iterable[str]) -> int:
        """How many texts of control tokens stand in these texts."""
        return sum(len(self._find(text)) for text in texts)

    def cut(self, messages: Sequence[ChatMessage]) -> CutMessages:
        """The same messages with a mark in each text of a control token."""
        pieces = [self._split(message.content) for message in messages]
        if all(len(piece) == 1 for piece in pieces):
            return CutMessages(tuple(messages))
        # Drawn anew, so that no text from outside can hold it.
        mark = f"{_CUT}{secrets.token_hex(8)}{_CUT}"
        pairs = zip(messages, pieces, strict=True)
        cut = [replace(message, content=mark.join(piece)) for message, piece in pairs]
        return CutMessages(tuple(cut), mark)

    def encode(self, text: str, mark: str = "", *, is_start: bool = True) -> TokenIds:
        """Token ids of a rendered text.

        Args:
            mark: where it is cut, see `cut`.
            is_start: it begins a prompt; otherwise it stands behind other tokens.
        """
        parts = text.split(mark) if mark else [text]
        # Behind an anchor: some tokenizers put a space before whatever they are given.
        anchored = [is_start, *[False] * (len(parts) - 1)]
        given = [
            part if begins else self._anchor + part
            for part, begins in zip(parts, anchored, strict=True)
        ]
        found = self._backend.encode_batch_fast(given, add_special_tokens=False)
        ids: list[int] = []
        for encoding, begins in zip(found, anchored, strict=True):
            ids += encoding.ids if begins else self._drop_anchor(encoding.ids)
        array = np.asarray(ids, dtype=np.int32)
        # The cache hands one array to many callers.
        array.setflags(write=False)
        return array

    def _drop_anchor(self, ids: list[int]) -> list[int]:
        if ids[0] != self._anchor_id:
            raise ConfigurationError(
                f"The tokenizer reads {self._anchor!r}, which closes a response, as token {ids[0]} "
                f"and not {self._anchor_id}. Repair its added tokens."
            )
        return ids[1:]

    def _split(self, text: str) -> list[str]:
        """`text` in parts none of which holds the text of a control token."""
        parts = [text]
        # Until none is found: a cut may leave another token's text, which overlapped.
        while True:
            spans = [self._find(part) for part in parts]
            if not any(spans):
                return parts
            parts = [
                piece
                for part, found in zip(parts, spans, strict=True)
                for piece in _cut_behind_first_character(part, found)
            ]

    def _find(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each text of a control token."""
        if not any(beginning in text for beginning in self._beginnings):
            return []
        encoding = self._finder.encode(text)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [span for token_id, span in pairs if token_id]


def _build_finder(tokens: Sequence[Any], normalizer: Any) -> Any:
    """A tokenizer that knows these added tokens and takes everything else for one token, 0.

    It finds what the model's own would find, at the speed of the library.
    """
    from tokenizers import AddedToken, Tokenizer, models

    finder = Tokenizer(models.WordLevel({_REST: 0}, unk_token=_REST))
    if normalizer is not None and any(token.normalized for token in tokens):
        finder.normalizer = normalizer
    # White space that a token takes in beside itself is no part of its text.
    finder.add_tokens(
        [
            AddedToken(token.content, normalized=token.normalized, single_word=token.single_word)
            for token in tokens
        ]
    )
    return finder


def _cut_behind_first_character(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    if any(end - start < 2 for start, end in spans):
        raise ContractError(
            "A text holds one character that the tokenizer reads as a control token. Remove it."
        )
    bounds = [0, *[start + 1 for start, _ in spans], len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]
