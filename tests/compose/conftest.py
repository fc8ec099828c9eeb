"""One stack a test, and a sentence where there is no Docker or no image.

Not part of `make test`: `make test-compose`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compose.stack import Stack, missing_images
from tests.kube.cluster import CommandError


@pytest.fixture(scope="session", autouse=True)
def surroundings() -> None:
    try:
        missing = missing_images()
    except CommandError as error:
        pytest.exit(f"make test-compose needs Docker with Compose: {error}", 2)
    if missing:
        pytest.exit(
            f"Docker has no image {', '.join(missing)}. "
            "Build ours with `make images`, pull the others.",
            2,
        )


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack() as stack:
        yield stack
