"""Bearer tokens and their roles. No error, log or repr shows a token."""

from __future__ import annotations

import enum
import functools
import hashlib
import hmac
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdar.contracts.errors import ConfigurationError
from sdar.wire.watched import read_file

MIN_TOKEN_CHARACTERS = 32
MAX_TOKEN_CHARACTERS = 512
_TOKEN = re.compile(rf"[A-Za-z0-9._~+/=-]{{{MIN_TOKEN_CHARACTERS},{MAX_TOKEN_CHARACTERS}}}")
_CLIENT_NAME_DIGITS = 12


class Role(enum.IntEnum):
    """What a token allows; the higher includes the lower."""

    READ = 1
    OPERATE = 2


@dataclass(frozen=True)
class Token:
    """One accepted token."""

    role: Role
    secret: str = field(repr=False)

    @functools.cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.secret.encode()).digest()

    @functools.cached_property
    def client(self) -> str:
        """A name for its bearer, from which the token cannot be derived."""
        return f"token-{self.digest.hex()[:_CLIENT_NAME_DIGITS]}"


def parse_tokens(text: str, source: str) -> tuple[Token, ...]:
    """The tokens of a file: one `read:TOKEN` or `operate:TOKEN` a line.

    Blank lines and lines that begin with # are left out.

    Raises:
        ConfigurationError: a line without a role or a good token; its number is named, and
            never its text.
    """
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        token = _parse_token(line, f"{source} line {number}")
        # Of one token with two roles it would be left to the file's order which of them counts.
        if find_token(tokens, token.secret):
            raise ConfigurationError(
                f"{source} line {number} repeats the token of an earlier line. Give each role its "
                "own."
            )
        tokens.append(token)
    if not tokens:
        raise ConfigurationError(
            f'{source} holds no token. Write one: echo "operate:$(sdar token)" > FILE'
        )
    return tuple(tokens)


def _parse_token(line: str, place: str) -> Token:
    role, _, secret = line.partition(":")
    if role not in ("read", "operate"):
        raise ConfigurationError(f"{place} names no role. Write read:TOKEN or operate:TOKEN.")
    return Token(Role[role.upper()], check_token(secret.strip(), place))


def check_token(secret: str, source: str) -> str:
    """The token itself.

    Raises:
        ConfigurationError: it is too short, or holds a character that a header cannot.
    """
    if not _TOKEN.fullmatch(secret):
        raise ConfigurationError(
            f"{source}: a token of {len(secret)} characters, expected {MIN_TOKEN_CHARACTERS} to "
            f"{MAX_TOKEN_CHARACTERS} of letters, digits or ._~+/=-. `sdar token` prints a good one."
        )
    return secret


def find_token(
    tokens: Sequence[Token],
    presented: str,
    compare: Callable[[bytes, bytes], bool] = hmac.compare_digest,
) -> Token | None:
    """The accepted token that was presented, or None.

    The time it takes reveals nothing: the digest is compared with that of every accepted token.
    """
    digest = hashlib.sha256(presented.encode(errors="replace")).digest()
    found = None
    # No return within the loop, which would show by its time how many tokens it went through.
    for token in tokens:
        if compare(token.digest, digest):
            found = token
    return found


def read_tokens(path: Path) -> tuple[Token, ...]:
    # utf-8-sig: editors on Windows write a mark at the start of a file.
    return parse_tokens(
        read_file(path, "SDAR_TOKENS_FILE").decode("utf-8-sig", errors="replace"), str(path)
    )
