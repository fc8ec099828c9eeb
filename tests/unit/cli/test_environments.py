from __future__ import annotations

import pytest

from sdar.cli.conformance.actions import ActionForm, choose_words, list_forms
from sdar.cli.environments import parse_address, parse_options
from sdar.contracts.errors import ConfigurationError


def test_options_are_yaml_scalars() -> None:
    pairs = [
        "id=CartPole-v1",
        "topk=3",
        "timeout_s=2.5",
        "small=true",
        "url=http://127.0.0.1:8000",
        "note=a: b: c",
        "empty=",
    ]
    assert parse_options(pairs) == {
        "id": "CartPole-v1",
        "topk": 3,
        "timeout_s": 2.5,
        "small": True,
        "url": "http://127.0.0.1:8000",
        "note": "a: b: c",
        "empty": "",
    }


@pytest.mark.parametrize(
    "pair", ["topk", "=3", "top k=3", "topk=[3]", "topk={a: 3}", "day=2026-01-01"]
)
def test_what_is_no_scalar_option_is_refused(pair: str) -> None:
    with pytest.raises(ConfigurationError, match="--option"):
        parse_options([pair])


@pytest.mark.parametrize("address", ["127.0.0.1:50051", "localhost:1", "[::1]:65535"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    assert parse_address(address) == address


@pytest.mark.parametrize(
    "address",
    ["", "localhost", ":50051", "localhost:", "localhost:0", "localhost:65536", "localhost:x"],
)
def test_anything_else_is_no_address(address: str) -> None:
    with pytest.raises(ConfigurationError, match="Write HOST:PORT"):
        parse_address(address)


def test_an_action_is_written_in_each_tag_that_the_action_format_names() -> None:
    forms = list_forms(
        "Reason inside <think> </think>, then write an action inside <action> </action>.",
        is_listed=True,
    )
    assert [form.write("look {}") for form in forms] == [
        "look {}",
        "<think>On we go.</think><action>look {}</action>",
    ]
    assert [form.is_bare for form in forms] == [True, False]


def test_where_no_action_is_listed_words_a_verb_and_a_number_are_tried() -> None:
    forms = list_forms("Write search[words].", is_listed=False)
    assert [form.write_words("red shoes") for form in forms] == [
        "red shoes",
        "search[red shoes]",
        "1",
    ]
    assert ActionForm(inner="search[{}]").write("click[back]") == "click[back]"


def test_the_words_of_a_task_change_with_the_turn() -> None:
    assert choose_words("who wrote the old red book", 0) == "who wrote the old"
    assert choose_words("who wrote the old red book", 5) == "book"
    assert choose_words("", 3) == "anything"
