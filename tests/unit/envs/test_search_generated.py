"""The generated world: the same bytes again, one answer a question, an expert finds all."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sdar.contracts.errors import ConfigurationError, ConflictError
from services.envs.search.demonstrations import UNKNOWN, SearchExpert, parse_question, read_fact
from services.envs.search.environment import SearchEnvironment
from services.envs.search.generate import check_world, generate
from services.envs.search.scoring import normalize_answer
from services.envs.search.world import QUESTIONS, STATEMENTS, build_world
from tests.support import SHIPPED_SEARCH_DATA

FILES = ("corpus.jsonl", "test.parquet", "train.parquet")


def make(directory: Path, num_tasks: int = 40, seed: int = 3) -> Path:
    generate(directory, num_tasks=num_tasks, seed=seed, report=lambda done, total: None)
    return directory


def play_expert(environment, task):
    """Results of an episode of the expert, who sees the task's sentence and the observations."""
    expert, results = SearchExpert(), []
    observation = environment.reset(task.task_id, seed=0).text
    while not results or not results[-1].is_over:
        results.append(
            environment.step(expert.next_action(task.description, task.task_type, observation))
        )
        observation = results[-1].observation.text
    return results


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path):
    first = make(tmp_path / "a")
    second = make(tmp_path / "b")
    other = make(tmp_path / "c", seed=4)
    assert sorted(path.name for path in first.iterdir()) == list(FILES)
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()


def test_the_shipped_data_is_what_the_generator_makes(tmp_path):
    """Questions are compared by value: a Parquet writer may order its bytes anew."""
    made = make(tmp_path / "data", num_tasks=200, seed=0)
    assert (made / "corpus.jsonl").read_bytes() == (
        SHIPPED_SEARCH_DATA / "corpus.jsonl"
    ).read_bytes()
    for name in ("train.parquet", "test.parquet"):
        assert pq.read_table(made / name).equals(pq.read_table(SHIPPED_SEARCH_DATA / name))
    assert sum(path.stat().st_size for path in SHIPPED_SEARCH_DATA.iterdir()) < 400_000


def test_progress_is_reported_to_the_end(tmp_path):
    reports = []
    said = generate(
        tmp_path / "data",
        num_tasks=20,
        seed=0,
        report=lambda done, total: reports.append((done, total)),
    )
    assert reports == [(done, 26) for done in range(1, 27)]
    assert said == "41 passages, 20 questions to train on and 6 to test, half of them of two hops."


def test_a_directory_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ConflictError, match="is not empty"):
        make(tmp_path)


@pytest.mark.parametrize("num_tasks", [9, 100_000])
def test_a_size_no_world_has_is_refused(tmp_path, num_tasks):
    with pytest.raises(ConfigurationError, match=f"asked for {num_tasks}"):
        make(tmp_path / "data", num_tasks=num_tasks)


def test_two_things_of_one_name_are_refused():
    world = build_world(
        random.Random(0),
        dict.fromkeys(("work", "person", "company", "town", "river", "mountain"), 4),
    )
    check_world(world)
    world.things["town"].append(world.things["river"][0].upper())
    with pytest.raises(ConfigurationError, match="Two things"):
        check_world(world)


def test_every_fact_is_stated_once_in_the_whole_corpus():
    """So no other passage can contradict the one that answers."""
    texts = [
        json.loads(line)["contents"]
        for line in (SHIPPED_SEARCH_DATA / "corpus.jsonl").read_text().splitlines()
    ]
    for question in questions_of("train") + questions_of("test"):
        thing, chain = parse_question(question)
        openings = [
            statement.format(subject=thing, object="") for statement in STATEMENTS[chain[0]]
        ]
        stating = [text for text in texts for opening in openings if opening.rstrip(".") in text]
        assert len(stating) == 1


def test_train_and_test_ask_different_questions_half_of_each_kind():
    train, test = (set(map(asked_of, questions_of(split))) for split in ("train", "test"))
    assert (len(train), len(test), len(train & test)) == (200, 60, 0)
    assert Counter(len(chain) for _, chain in train | test) == {1: 130, 2: 130}
    assert {chain for _, chain in train | test} == set(QUESTIONS)


def asked_of(question):
    thing, chain = parse_question(question)
    return thing, tuple(chain)


def questions_of(split):
    return (
        pq.read_table(SHIPPED_SEARCH_DATA / f"{split}.parquet", columns=["question"])
        .column("question")
        .to_pylist()
    )


def test_no_question_holds_its_answer():
    for split in ("train", "test"):
        for entry in pq.read_table(SHIPPED_SEARCH_DATA / f"{split}.parquet").to_pylist():
            (answer,) = entry["golden_answers"]
            assert normalize_answer(answer) not in normalize_answer(entry["question"])
            assert entry["reward_model"]["ground_truth"]["target"] == [answer]


def test_the_expert_answers_every_shipped_question_in_two_or_three_turns():
    environment = SearchEnvironment(data_dir=str(SHIPPED_SEARCH_DATA))
    lengths = Counter()
    for split in environment.splits:
        for task in environment.list_tasks(split):
            results = play_expert(environment, task)
            assert results[-1].is_success, task
            assert all(result.is_action_valid for result in results)
            lengths[task.task_type, len(results)] += 1
    assert lengths == {("one_hop", 2): 130, ("two_hop", 3): 130}


@pytest.mark.parametrize(("num_tasks", "seed"), [(10, 1), (10, 2), (40, 3), (500, 4)])
@pytest.mark.usefixtures("own_home")
def test_the_expert_answers_every_question_of_other_worlds(tmp_path, num_tasks, seed):
    environment = SearchEnvironment(data_dir=str(make(tmp_path / "data", num_tasks, seed)))
    tasks = itertools.chain(*(environment.list_tasks(split) for split in environment.splits))
    assert all(play_expert(environment, task)[-1].is_success for task in tasks)


def test_evaluation_prefixes_are_balanced():
    tasks = SearchEnvironment(data_dir=str(SHIPPED_SEARCH_DATA)).list_tasks("test")
    assert [task.task_type for task in tasks[:4]] == ["one_hop", "two_hop"] * 2


def test_the_expert_speaks_in_the_agents_form():
    expert = SearchExpert()
    assert expert.next_action("Who founded Tatir Works?", "one_hop", "") == (
        "<think>Find Tatir Works.</think><search>Tatir Works</search>"
    )
    passage = 'Doc 1 (Title: "Tatir Works") Tatir Works was founded by Lemin Fatun. More.'
    seen = f"<information>\n{passage}\n</information>"
    assert expert.next_action("Who founded Tatir Works?", "one_hop", seen) == (
        "<think>It is Lemin Fatun.</think><answer>Lemin Fatun</answer>"
    )


def test_the_expert_reads_only_the_passage_of_the_thing_itself():
    seen = 'Doc 1 (Title: "Tatir Works Union") Tatir Works was founded by Nobody Else.'
    assert read_fact(seen, "Tatir Works", "founder") is None
    expert = SearchExpert()
    expert.next_action("Who founded Tatir Works?", "one_hop", "")
    assert expert.next_action("Who founded Tatir Works?", "one_hop", seen).endswith(
        f"<answer>{UNKNOWN}</answer>"
    )


def test_every_wording_of_a_question_is_understood_as_what_it_asks():
    for chain, wordings in QUESTIONS.items():
        for wording in wordings:
            found = parse_question(wording.format("The Quiet Harbor"))
            assert found == ("The Quiet Harbor", list(chain))
    with pytest.raises(ValueError, match="no question of the generated world"):
        parse_question("How many?")
