"""What every retrieval kind promises, whatever it chooses by."""

from __future__ import annotations

import dataclasses

import pytest

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.rules import RULES
from sdar.in_process.memory_bus import MemoryBus
from services.teacher.embedding import SentenceEncoder, SkillIndex
from services.teacher.retrieval import Retriever
from services.teacher.retrieval_kinds import RETRIEVAL_KINDS, SkillSources
from services.teacher.skills import SkillLibrary
from services.teacher.utility import SkillUtility
from tests.unit.teacher.builders import CLEAN, LIBRARY

every_kind = pytest.mark.parametrize("name", RETRIEVAL_KINDS.names())
DANCE = dataclasses.replace(CLEAN, task_type="dance", description="dance until dawn")


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder()


@pytest.fixture
def make(encoder, tmp_path):
    def make_kind(name, library=LIBRARY, num_skills=2):
        index = SkillIndex(library.specific, encoder, tmp_path)
        utility = SkillUtility(MemoryBus({}), 0.5)
        return RETRIEVAL_KINDS[name](SkillSources(library, num_skills, index, utility))

    return make_kind


async def choose(kind, task, key="g0"):
    await kind.prepare(task, key)
    return kind.choose(task, key)


@every_kind
@pytest.mark.parametrize("task", [CLEAN, DANCE])
async def test_what_is_chosen_is_specific_once_and_of_the_library(make, name, task):
    chosen = await choose(make(name), task)
    assert set(chosen) <= set(LIBRARY.specific)
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) <= 2 or name == "all"


def test_a_kind_that_learns_is_refused_where_no_episode_is_scored():
    learning = {name for name in RETRIEVAL_KINDS.names() if RETRIEVAL_KINDS[name].learns}
    of_kinds = [rule for rule in RULES if getattr(rule, "key", "") == "teacher.retrieval"]
    assert {rule.value for rule in of_kinds} == learning


@every_kind
async def test_all_episodes_of_a_group_see_the_same_skills(make, name):
    kind = make(name)
    assert await choose(kind, CLEAN) == await choose(kind, CLEAN)


@every_kind
async def test_the_choice_does_not_depend_on_which_task_of_the_type_is_asked_for_by_id(make, name):
    other = dataclasses.replace(CLEAN, task_id="t9", seed=7)
    assert await choose(make(name), CLEAN) == await choose(make(name), other)


@every_kind
async def test_a_library_without_specific_skills_gives_none(make, name):
    assert await choose(make(name, SkillLibrary(LIBRARY.skills[:1])), CLEAN) == ()


@every_kind
async def test_a_kind_that_shows_no_skills_chooses_none(make, name):
    kind = make(name)
    assert kind.shows_skills or await choose(kind, CLEAN) == ()


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'oracle'\. Known: all, embedding, keyword"):
        Retriever(LIBRARY, kind="oracle", num_skills=1)
