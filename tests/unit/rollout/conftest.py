from __future__ import annotations

import pytest

from sdar.model.chat import ChatTokenizer
from tests.unit.rollout.fakes import write_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(model_path):
    return ChatTokenizer(model_path)
