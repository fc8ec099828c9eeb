from __future__ import annotations

import dataclasses

import pytest

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.streams import Stream
from sdar.in_process.memory_bus import MemoryBus
from services.envs.household import HouseholdEnvironment
from services.teacher.embedding import SentenceEncoder, SkillIndex
from services.teacher.retrieval import Retriever
from services.teacher.skills import SHIPPED_LIBRARIES, SkillLibrary, load_skill_library
from services.teacher.utility import SkillUtility
from tests.unit.teacher.builders import CLEAN, LIBRARY, play

HEAT = dataclasses.replace(
    CLEAN, task_type="heat", description="heat the egg and put it in the desk ."
)
DANCE = dataclasses.replace(CLEAN, task_type="dance", description="dance until dawn")


def retrieve(kind, task=CLEAN, key="g0", num_skills=3, library=LIBRARY, **options):
    return Retriever(library, kind=kind, num_skills=num_skills, **options).retrieve(task, key)


def test_by_task_type_the_teacher_gets_general_skills_and_those_of_the_type():
    assert retrieve("task_type").skill_ids == ("general", "clean")
    assert retrieve("task_type", HEAT).skill_ids == ("general", "heat", "heat-2")
    assert retrieve("task_type", HEAT, num_skills=1).skill_ids == ("general", "heat")


def test_an_unknown_task_type_is_a_miss_with_general_skills_only():
    retrieval = retrieve("task_type", DANCE)
    assert (retrieval.skill_ids, retrieval.is_miss) == (("general",), True)
    assert not retrieve("task_type").is_miss


def test_keywords_find_the_skill_by_the_tasks_sentence():
    # The type is never looked at: it may be unknown where tasks come from outside.
    found = retrieve("keyword", dataclasses.replace(CLEAN, task_type="?")).specific[0].skill_id
    assert found == "clean"
    assert retrieve("keyword", DANCE).is_miss


def test_keywords_find_the_right_skill_of_every_household_task():
    library = load_skill_library(SHIPPED_LIBRARIES / "household")
    for task in HouseholdEnvironment().list_tasks("heldout"):
        assert retrieve("keyword", task, library=library).specific[0].task_types == (
            task.task_type,
        )


def test_retrieval_never_reads_observations(chat):
    """Observations name sink and oven, words of two skills; the sentence asks for neither."""
    trajectory = play(chat, DANCE)
    assert "sink" in trajectory.turns[0].messages[0].content
    assert retrieve("keyword", trajectory.task).specific == ()


def test_words_that_every_skill_has_retrieve_nothing():
    assert retrieve("keyword", dataclasses.replace(CLEAN, description="how to")).is_miss


def test_all_shows_everything_whatever_the_number():
    assert retrieve("all", num_skills=1).skills == LIBRARY.skills


def test_none_shows_nothing_general_ones_included():
    retrieval = retrieve("none")
    assert (retrieval.skills, retrieval.is_miss) == ((), False)


def test_random_skills_are_the_groups_own_and_repeatable():
    draws = {
        key: retrieve("random", key=key, num_skills=1).skill_ids for key in map(str, range(40))
    }
    assert draws == {key: retrieve("random", key=key, num_skills=1).skill_ids for key in draws}
    assert {ids[1] for ids in draws.values()} == {"clean", "heat", "heat-2", "cool"}


def test_the_wrong_fraction_is_deterministic_recorded_and_about_right():
    keys = [f"group-{number}" for number in range(2000)]
    retrievals = [retrieve("task_type", key=key, wrong_skill_fraction=0.5) for key in keys]
    assert retrievals == [retrieve("task_type", key=key, wrong_skill_fraction=0.5) for key in keys]
    swapped = [retrieval for retrieval in retrievals if retrieval.is_swapped]
    assert 0.47 < len(swapped) / len(keys) < 0.53  # three standard errors are 0.034
    assert {retrieval.specific[0].skill_id for retrieval in swapped} == {"heat", "cool"}
    assert {retrieval.label for retrieval in swapped} == {"task_type+swapped"}
    assert {r.skill_ids for r in retrievals if not r.is_swapped} == {("general", "clean")}


def test_a_swap_shows_as_many_skills_as_were_right_and_keeps_the_general_ones():
    retrieval = retrieve("task_type", wrong_skill_fraction=1.0)
    assert retrieval.is_swapped
    assert len(retrieval.specific) == 1
    assert retrieval.general == LIBRARY.general


def test_where_nothing_was_found_nothing_is_swapped_in():
    retrieval = retrieve("task_type", DANCE, wrong_skill_fraction=1.0)
    assert (retrieval.specific, retrieval.is_swapped, retrieval.is_miss) == ((), False, True)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return SkillIndex(LIBRARY.specific, SentenceEncoder(), tmp_path_factory.mktemp("cache"))


def test_by_meaning_the_tasks_sentence_alone_is_looked_at(index):
    retrieval = retrieve(
        "embedding", dataclasses.replace(HEAT, task_type="?"), num_skills=2, index=index
    )
    assert retrieval.skill_ids == ("general", "heat", "heat-2")
    assert (retrieval.label, retrieval.is_miss) == ("embedding", False)


def test_what_is_found_by_meaning_can_be_swapped(index):
    retrieval = retrieve("embedding", HEAT, num_skills=1, index=index, wrong_skill_fraction=1.0)
    assert retrieval.specific[0].skill_id in ("clean", "cool")
    assert retrieval.label == "embedding+swapped"


async def test_by_utility_the_skills_of_the_tasks_type_take_turns_and_every_key_keeps_its_choice():
    retriever = Retriever(
        LIBRARY, kind="ucb", num_skills=1, utility=SkillUtility(MemoryBus({}), 0.5)
    )
    shown = {}
    for key in ("g0", "g1", "g2", "g3"):
        await retriever.prepare(HEAT, key)
        shown[key] = retriever.retrieve(HEAT, key).skill_ids
    assert list(shown.values()) == [("general", "heat"), ("general", "heat-2")] * 2
    for key, skill_ids in shown.items():
        await retriever.prepare(HEAT, key)
        assert retriever.retrieve(HEAT, key).skill_ids == skill_ids
    assert retriever.retrieve(HEAT, "g0").label == "ucb"


async def test_a_choice_of_skills_that_the_library_no_longer_has_is_a_miss():
    bus = MemoryBus({})
    await Retriever(LIBRARY, kind="ucb", num_skills=1, utility=SkillUtility(bus, 0.5)).prepare(
        HEAT, "g0"
    )
    shrunk = Retriever(
        SkillLibrary(LIBRARY.skills[3:]), kind="ucb", num_skills=1, utility=SkillUtility(bus, 0.5)
    )
    await shrunk.prepare(HEAT, "g0")
    retrieval = shrunk.retrieve(HEAT, "g0")
    assert (retrieval.specific, retrieval.is_miss) == ((), True)


async def test_by_utility_a_type_without_skills_is_a_miss_and_is_not_chosen_for():
    bus = MemoryBus({})
    retriever = Retriever(LIBRARY, kind="ucb", num_skills=1, utility=SkillUtility(bus, 0.5))
    await retriever.prepare(DANCE, "g0")
    assert retriever.retrieve(DANCE, "g0").is_miss
    assert await bus.newest(Stream.SKILL_EVENTS) is None


def test_swapping_is_refused_where_no_skill_is_the_wrong_one():
    with pytest.raises(
        ConfigurationError, match=r"retrieval ucb .* Use embedding or keyword or task_type"
    ):
        Retriever(
            LIBRARY,
            kind="ucb",
            num_skills=1,
            wrong_skill_fraction=0.5,
            utility=SkillUtility(MemoryBus({}), 0.5),
        )


@pytest.mark.parametrize(
    ("kind", "library"), [("all", LIBRARY), ("task_type", SkillLibrary(LIBRARY.skills[:2]))]
)
def test_a_wrong_fraction_without_a_wrong_skill_is_refused(kind, library):
    with pytest.raises(ConfigurationError, match="no wrong skill to swap in"):
        Retriever(library, kind=kind, num_skills=1, wrong_skill_fraction=0.5)
