from __future__ import annotations

import pytest
import structlog

from sdar.model.chat import ChatTokenizer
from tests.unit.teacher.builders import make_model_directory


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    return make_model_directory(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def chat(model_directory):
    return ChatTokenizer(model_directory)


@pytest.fixture(autouse=True)
def log_events():
    """What was logged, instead of its text on the terminal."""
    with structlog.testing.capture_logs() as events:
        yield events
