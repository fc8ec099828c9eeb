"""Published question sets and corpora load unchanged; a malformed one is refused by name."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdar.contracts.errors import ConfigurationError
from services.envs.search.corpus import open_corpus
from services.envs.search.passages import Passage
from services.envs.search.questions import open_questions


def row(
    index,
    source="nq",
    target=("Wilhelm Conrad Röntgen",),
    question="who got the first nobel prize in physics?",
):
    """One row as PeterJinGo/nq_hotpotqa_train has it."""
    rules = "Answer the given question. You must conduct reasoning inside <think>."
    asked = f"{rules} Question: {question}\n"
    return {
        "id": f"train_{index}",
        "question": question,
        "golden_answers": list(target),
        "data_source": source,
        "prompt": [{"content": asked, "role": "user"}],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": {"target": list(target)}, "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
    }


def load(tmp_path, rows, schema=None, without=()):
    table = pa.Table.from_pylist(rows, schema=schema).drop_columns(list(without))
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=2)
    return open_questions("search", "train", tmp_path / "train.parquet")


def test_a_published_question_set_loads_unchanged(tmp_path):
    questions = load(tmp_path, [row(0), row(1, "hotpotqa", ("yes", "Yes."), "Is it so?"), row(2)])
    task, targets = questions.find("train-1")
    assert (task.task_type, task.description, task.split) == ("hotpotqa", "Is it so?", "train")
    assert targets == ("yes", "Yes.")


def test_a_question_set_prepared_for_agents_loads_unchanged(tmp_path):
    """The source bears a tag; the question stands in `env_kwargs`, beside a two-message prompt."""
    prepared = row(0, "searchR1_triviaqa")
    prepared["env_kwargs"] = {
        "ground_truth": {"target": ["Paris"]},
        "question": "Which one?",
        "data_source": "searchR1_nq",
    }
    prepared["prompt"] = [{"content": "You are helpful.", "role": "system"}, *prepared["prompt"]]
    task, _ = load(tmp_path, [prepared], without=["question"]).find("train-0")
    assert (task.task_type, task.description) == ("triviaqa", "Which one?")


def test_a_question_that_stands_only_in_the_prompt_is_found_there(tmp_path):
    task, _ = load(tmp_path, [row(0)], without=["question"]).find("train-0")
    assert task.description == "who got the first nobel prize in physics?"


@pytest.mark.parametrize(
    "target", [np.array(["Paris", "Lyon"]), ["Paris", "Lyon"], ("Paris", "Lyon")]
)
def test_targets_of_any_array_kind_load(tmp_path, target):
    entry = row(0)
    entry["reward_model"]["ground_truth"]["target"] = target
    assert load(tmp_path, [entry]).find("train-0")[1] == ("Paris", "Lyon")


def test_a_target_that_is_one_text_is_one_answer(tmp_path):
    entry = row(0)
    entry["reward_model"]["ground_truth"]["target"] = "Paris"
    assert load(tmp_path, [entry]).find("train-0")[1] == ("Paris",)


def test_large_strings_as_pandas_writes_them_load(tmp_path):
    target = pa.large_list(pa.large_string())
    schema = pa.schema(
        [
            ("data_source", pa.large_string()),
            ("question", pa.large_string()),
            ("reward_model", pa.struct([("ground_truth", pa.struct([("target", target)]))])),
        ]
    )
    assert load(tmp_path, [row(0)], schema).find("train-0")[1] == ("Wilhelm Conrad Röntgen",)


def test_every_prefix_is_as_balanced_as_it_can_be(tmp_path):
    """Sources a (5 rows), b (3), c (1): rounds a b c, a b, a b, a, a."""
    sources = [*"aaaaabbbc"]
    questions = load(tmp_path, [row(index, source) for index, source in enumerate(sources)])
    assert [task.task_type for task in questions] == [*"abcababaa"]
    assert [task.task_id for task in questions[:4]] == ["train-0", "train-5", "train-8", "train-1"]
    expected = Counter(f"train-{index}" for index in range(9))
    assert Counter(task.task_id for task in questions) == expected
    assert (len(questions), questions[-1].task_id) == (9, "train-4")


def test_a_file_is_read_once_a_process_and_again_when_it_changes(tmp_path):
    first = load(tmp_path, [row(0)])
    assert open_questions("search", "train", tmp_path / "train.parquet") is first
    assert len(load(tmp_path, [row(0), row(1)])) == 2


def null_data_source(entry):
    entry["data_source"] = None


def blank_question(entry):
    entry["question"] = "  "


def no_target(entry):
    entry["reward_model"]["ground_truth"]["target"] = []


def null_target(entry):
    entry["reward_model"]["ground_truth"]["target"] = ["a", None]


def null_reward_model(entry):
    entry["reward_model"] = None


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (null_data_source, "row 1, column data_source: None, expected a text"),
        (blank_question, "row 1, column question: '  ', expected a text"),
        (no_target, r"row 1, column reward_model.ground_truth.target: \[\], expected a list"),
        (
            null_target,
            r"row 1, column reward_model.ground_truth.target: \['a', None\], expected texts only",
        ),
        (
            null_reward_model,
            "row 1, column reward_model.ground_truth.target: None, expected a list",
        ),
    ],
)
def test_a_malformed_row_is_named(tmp_path, spoil, problem):
    rows = [row(0), row(1), row(2)]
    spoil(rows[1])
    with pytest.raises(ConfigurationError, match=f"train.parquet {problem}"):
        load(tmp_path, rows)


@pytest.mark.parametrize(
    ("without", "problem"),
    [
        (["data_source"], "has no column data_source. Its columns are id, question"),
        (["reward_model"], "has no column reward_model.ground_truth.target"),
        (["question", "prompt"], "has no question: none of env_kwargs.question"),
    ],
)
def test_a_missing_column_is_named(tmp_path, without, problem):
    with pytest.raises(ConfigurationError, match=problem):
        load(tmp_path, [row(0)], without=without)


def test_a_column_of_another_kind_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="column data_source holds int64, expected text"):
        load(tmp_path, [row(0, source=3)])


def test_what_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "test.parquet").write_text("question,answer\n")
    with pytest.raises(ConfigurationError, match="cannot be read as Parquet"):
        open_questions("search", "test", tmp_path / "test.parquet")


def test_a_corpus_is_read_by_place(tmp_path):
    path = tmp_path / "corpus.jsonl"
    entries = [
        {"id": 0, "contents": '"A"\nan a'},
        {"id": "x1", "contents": "no title, é", "more": 1},
    ]
    path.write_text(
        "\n".join([json.dumps(entries[0]), "", json.dumps(entries[1], ensure_ascii=False)]),
        encoding="utf-8",
    )
    corpus = open_corpus(path)
    assert len(corpus) == 2
    assert [corpus[1], corpus[0]] == [Passage("x1", "no title, é"), Passage("0", '"A"\nan a')]
    assert (corpus[0].title, corpus[0].text) == ('"A"', "an a")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2 is not JSON"),
        ("[1, 2]", r"line 2 is \[1, 2\]; expected"),
        ('{"contents": "a"}', "line 2: id is null"),
        ('{"id": true, "contents": "a"}', "line 2: id is true"),
        ('{"id": "1"}', "line 2: contents is null"),
        ('{"id": "1", "contents": " "}', 'line 2: contents is " "'),
        ('{"id": "1", "contents": {"title": "a"}}', "line 2: contents is {"),
    ],
)
def test_a_malformed_passage_is_named(tmp_path, line, problem):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "0", "contents": "a"}\n' + line + "\n")
    with pytest.raises(ConfigurationError, match=problem):
        open_corpus(path)


def test_a_binary_corpus_is_refused(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\xff\xfe\x00\x01\n")
    with pytest.raises(ConfigurationError, match="line 1 is not JSON"):
        open_corpus(path)


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(ConfigurationError, match="is empty"):
        open_corpus(tmp_path / "corpus.jsonl")
