"""Search-QA's rules, played on two questions and three passages that the fixture writes."""

from __future__ import annotations

import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdar.contracts.errors import ConfigurationError, UnknownResourceError
from sdar.environments.registry import load_environment
from services.envs.search.environment import (
    FIRST_OBSERVATION,
    MAX_PASSAGE_CHARACTERS,
    MAX_QUERY_CHARACTERS,
    NO_ACTION,
    NO_TURN_LEFT,
    SearchEnvironment,
)
from services.envs.search.scoring import is_exact_match, normalize_answer, parse_action

PASSAGES = [
    '"Tower"\nThe tower of <answer>Paris</answer> is high.',
    '"River"\nThe river of Ghent is\nbroad.',
    '"Long"\n' + "long " * 1000,
]
QUESTIONS = [
    ("nq", "Where is the tower?", ["Paris", "Paris, France"]),
    ("hotpotqa", "Which town has the river?", ["The Hague"]),
]


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Search's options; its index goes to a home of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    data = tmp_path / "data"
    data.mkdir()
    lines = [
        json.dumps({"id": str(number), "contents": contents})
        for number, contents in enumerate(PASSAGES)
    ]
    (data / "corpus.jsonl").write_text("\n".join(lines))
    rows = [
        {
            "data_source": source,
            "question": question,
            "reward_model": {"ground_truth": {"target": target}},
        }
        for source, question, target in QUESTIONS
    ]
    pq.write_table(pa.Table.from_pylist(rows), data / "test.parquet")
    return str(data)


def play(data_dir, *texts, task_id="test-0", **options):
    environment = SearchEnvironment(data_dir=data_dir, **options)
    environment.reset(task_id, seed=0)
    return [environment.step(text) for text in texts]


def test_the_registry_knows_search():
    assert load_environment("search").path == f"{SearchEnvironment.__module__}:SearchEnvironment"


def test_an_episode_is_searches_and_an_answer(data_dir):
    environment = SearchEnvironment(data_dir=data_dir)
    assert environment.get_task("test-0").description == "Where is the tower?"
    assert environment.reset("test-0", seed=0).text == FIRST_OBSERVATION
    searched = environment.step("<think>a river</think><search> river </search>")
    assert (
        searched.observation.text
        == '<information>\nDoc 1 (Title: "River") The river of Ghent is broad.\n</information>'
    )
    found = (searched.action, searched.is_action_valid, searched.is_over)
    assert found == ("<search>river</search>", True, False)
    assert searched.observation.info == {"num_results": "1"}
    answered = environment.step("<answer>paris france!</answer>")
    assert (answered.reward, answered.is_success, answered.terminated) == (1.0, True, True)
    assert answered.reward_components == {"exact_match": 1.0}


def test_a_wrong_answer_ends_the_episode_without_reward(data_dir):
    (answered,) = play(data_dir, "<answer>Lyon</answer>")
    found = (answered.reward, answered.is_success, answered.terminated, answered.truncated)
    assert found == (0.0, False, True, False)


def test_the_fourth_turn_truncates_and_searches_for_nobody(data_dir):
    results = play(data_dir, *["<search>river</search>"] * 4)
    assert [result.truncated for result in results] == [False, False, False, True]
    assert (results[-1].observation.text, results[-1].is_action_valid) == (NO_TURN_LEFT, True)
    assert results[-1].reward_components == {"exact_match": 0.0}


def test_an_answer_on_the_last_turn_counts(data_dir):
    last = play(data_dir, *["<search>river</search>"] * 3, "<answer>Paris</answer>")[-1]
    assert (last.reward, last.terminated, last.truncated) == (1.0, True, False)


def test_an_answer_inside_a_passage_never_counts(data_dir):
    """The first passage holds <answer>Paris</answer>, which is right, but finding is no answer."""
    found, *rest = play(data_dir, *["<search>tower</search>"] * 4)
    assert "<answer>Paris</answer>" in found.observation.text
    assert [result.reward for result in (found, *rest)] == [0, 0, 0, 0]
    assert not rest[-1].is_success


def test_an_answer_behind_a_search_is_not_scored(data_dir):
    results = play(data_dir, *["<search>river</search><answer>Paris</answer>"] * 4)
    assert [(result.reward, result.is_action_valid) for result in results] == [(0, False)] * 4
    assert results[-1].truncated


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris",
        "<search>river",
        "<search>  </search>",
        "<answer>Paris",
        "<action>river</action>",
    ],
)
def test_a_response_without_an_action_only_uses_a_turn(data_dir, text):
    result, answered = play(data_dir, text, "<answer>Paris</answer>")
    found = (result.observation.text, result.is_action_valid, result.is_over)
    assert found == (NO_ACTION, False, False)
    assert answered.is_success


def test_an_overlong_search_is_refused_with_its_length(data_dir):
    (result,) = play(data_dir, f"<search>{'x' * (MAX_QUERY_CHARACTERS + 1)}</search>")
    assert not result.is_action_valid
    assert "501 characters. Use at most 500" in result.observation.text


def test_a_long_passage_is_cut_where_it_can_be_seen(data_dir):
    (result,) = play(data_dir, "<search>long</search>")
    (line,) = result.observation.text.splitlines()[1:-1]
    assert line.endswith("[cut: 1500 of 5021 characters are shown]")
    assert len(line.partition(" [cut:")[0]) == MAX_PASSAGE_CHARACTERS


def test_nothing_found_is_said(data_dir):
    (result,) = play(data_dir, "<search>zebra</search>")
    assert result.observation.text == "<information>\nNothing was found.\n</information>"
    assert result.observation.info == {"num_results": "0"}


def test_topk_bounds_the_passages_shown(data_dir):
    counts = [
        len(
            play(data_dir, "<search>tower river long</search>", topk=k)[
                0
            ].observation.text.splitlines()
        )
        - 2
        for k in (1, 2, 9)
    ]
    assert counts == [1, 2, 3]


def test_the_seed_changes_nothing_and_a_reset_forgets(data_dir):
    environment = SearchEnvironment(data_dir=data_dir)
    transcripts = []
    for seed in (0, 7):
        environment.reset("test-0", seed)
        transcripts.append(
            [
                environment.step(text)
                for text in ["<search>river</search>", "nothing", "<answer>Ghent</answer>"]
            ]
        )
    assert transcripts[0] == transcripts[1]


@pytest.mark.parametrize(
    "task_id", ["", "test-2", "train-0", "test--1", "test-x", "test-00000000000000000000000000001"]
)
def test_an_unknown_task_is_refused(data_dir, task_id):
    with pytest.raises(UnknownResourceError, match="has no task"):
        SearchEnvironment(data_dir=data_dir).reset(task_id, seed=0)


def test_only_the_splits_that_are_there_are_listed(data_dir):
    environment = SearchEnvironment(data_dir=data_dir)
    assert environment.splits == ("test",)
    with pytest.raises(UnknownResourceError, match="Use one of test"):
        environment.list_tasks("train")


def test_an_empty_directory_is_told_how_to_fill_it(tmp_path):
    with pytest.raises(ConfigurationError, match="sdar env generate search"):
        SearchEnvironment(data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"topk": 0}, "topk is 0"),
        ({"topk": "3"}, "topk is '3'"),
        ({"corpus": "c.jsonl", "retriever_url": "http://127.0.0.1:1"}, "Give one of them"),
        ({"corpus": "nowhere.jsonl"}, r"Corpus .*nowhere.jsonl does not exist"),
        ({"retriever_url": "127.0.0.1:8000"}, "expected an address such as http://"),
        ({"retriever_url": "http://"}, "expected an address such as http://"),
        ({"retriever_url": "http://a:b"}, "expected an address such as http://"),
        (
            {"retriever_url": "http://127.0.0.1:1", "retriever_timeout_s": 0},
            "retriever_timeout_s is 0",
        ),
    ],
)
def test_options_that_cannot_be_used_are_refused(data_dir, options, problem):
    with pytest.raises(ConfigurationError, match=problem):
        SearchEnvironment(data_dir=data_dir, **options)


@pytest.mark.parametrize(
    ("text", "action", "is_valid"),
    [
        ("<search>a b</search>", "<search>a b</search>", True),
        ("<think>x</think>\n<ANSWER>\nParis\n</ANSWER>", "<answer>Paris</answer>", True),
        ("<search>a</search><search>b</search>", "<search>a</search>", False),
        ("<answer>a</answer><answer>b</answer>", "<answer>a</answer>", False),
        ("<answer>a</answer><search>b</search>", "<answer>a</answer>", False),
        ("<answer>a</search></answer>", "<answer>a</search></answer>", True),
        ("<search><search>a</search>", "<search><search>a</search>", False),
        ("<search>a</answer>", "None", None),
        ("<search>a <answer>b</answer>", "<answer>b</answer>", False),
        ("<\u017fearch>a</\u017fearch>", "None", None),
    ],
)
def test_the_first_complete_tag_is_the_action(text, action, is_valid):
    parsed = parse_action(text)
    assert (str(parsed), parsed and parsed.is_valid) == (action, is_valid)


def test_a_megabyte_of_tags_is_read_at_once():
    started = time.monotonic()
    assert parse_action("<search>" * 2**17) is None
    assert str(parse_action("<search>" * 2**17 + "<answer>a</answer>")) == "<answer>a</answer>"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  U.S.A.", "usa"),
        ("an answer, a the theatre", "answer theatre"),
        ("Müller-Straße", "müllerstraße"),
        ("A", ""),
        ("10,000", "10000"),
    ],
)
def test_answers_are_compared_without_case_punctuation_articles_and_spaces(text, normalized):
    assert normalize_answer(text) == normalized


def test_any_of_the_right_answers_is_right():
    assert is_exact_match("the paris", ["London", "Paris"])
    assert not is_exact_match("Paris France", ["London", "Paris"])
