"""The invented world of Search-QA: its things, their relations, and the words for them.

Every statement names its subject in full and ends with its object, so a passage can be understood
one sentence at a time. A subject has one object of each relation: every question has one answer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

STATEMENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "author": ("{subject} was written by {object}.", "The author of {subject} is {object}."),
        "birthplace": (
            "{subject} was born in {object}.",
            "The birthplace of {subject} is {object}.",
        ),
        "founder": ("{subject} was founded by {object}.", "The founder of {subject} is {object}."),
        "seat": ("{subject} is based in {object}.", "The seat of {subject} is {object}."),
        "river": (
            "{subject} lies on the {object}.",
            "The river that flows through {subject} is the {object}.",
        ),
        "source": (
            "The {subject} rises on {object}.",
            "The source of the {subject} is on {object}.",
        ),
    }
)
"""Relations and how they are stated."""

QUESTIONS: Mapping[tuple[str, ...], tuple[str, ...]] = MappingProxyType(
    {
        ("author", "birthplace"): (
            "Where was the author of {} born?",
            "In which town was the author of {} born?",
        ),
        ("founder", "birthplace"): (
            "Where was the founder of {} born?",
            "In which town was the founder of {} born?",
        ),
        ("birthplace", "river"): (
            "Which river flows through the birthplace of {}?",
            "On which river was {} born?",
        ),
        ("seat", "river"): (
            "Which river flows through the seat of {}?",
            "On which river is {} based?",
        ),
        ("river", "source"): (
            "On which mountain does the river of {} rise?",
            "Where does the river of {} rise?",
        ),
        ("author",): ("Who wrote {}?", "Who is the author of {}?"),
        ("birthplace",): ("Where was {} born?", "In which town was {} born?"),
        ("founder",): ("Who founded {}?", "Who is the founder of {}?"),
        ("seat",): ("Where is {} based?", "In which town is {} based?"),
        ("river",): ("Which river flows through {}?", "On which river does {} lie?"),
        ("source",): ("On which mountain does the {} rise?", "Where does the {} rise?"),
    }
)
"""What is asked: a chain of relations, looked up one after the other from the thing named.

Longer chains stand first, because their wordings are narrower.
"""

ASIDES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "work": ("{} was printed {number} times.", "{} has {number} pages."),
        "person": ("{} worked as a {trade}.", "{} was a {trade} for {number} years."),
        "company": ("{} makes {goods}.", "{} sells {goods} and employs {number} people."),
        "town": ("{} has {number} streets.", "The market of {} sells {goods}."),
        "river": ("The {} is {number} miles long.", "The {} has {number} bridges."),
    }
)
"""Sentences that no question asks about."""

DISTRACTORS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "person",
        "{} Prize",
        ("The {} Prize is given to one {trade} a year.", "The {} Prize was given {number} times."),
    ),
    ("town", "{} Fair", ("The {} Fair shows {goods}.", "The {} Fair lasts {number} days.")),
    (
        "work",
        "Museum of {}",
        ("The Museum of {} keeps {goods}.", "The Museum of {} has {number} rooms."),
    ),
    (
        "company",
        "{} Union",
        ("The {} Union has {number} members.", "The {} Union was led by a {trade}."),
    ),
)
"""Passages about something else that bears a thing's name: its kind, the title, the sentences."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ADJECTIVES = _words(
    "Silver Golden Quiet Broken Hidden Distant Frozen Burning Crimson Hollow Gentle Bitter Ancient "
    "Painted Sleeping Narrow "
    "Forgotten Crooked Shining Velvet Wandering Drowned Scarlet Empty Patient Lonely Northern "
    "Southern Eastern Western "
    "Endless Borrowed Stolen Hungry Singing Whispering Folded Paper Glass Iron Copper Marble "
    "Wooden Winter Summer Autumn "
    "Midnight Morning"
)
_NOUNS = _words(
    "Harbor Garden Lantern Orchard Mirror Bridge Tower Window Candle Compass Ladder Kingdom Island "
    "Valley Meadow Forest "
    "Desert Ocean Mountain Letter Journey Shadow Feather Needle Hammer Anchor Violin Trumpet "
    "Carpet Curtain Fountain "
    "Staircase Chimney Cellar Attic Balcony Kettle Teapot Saddle Wagon Carriage Engine Signal "
    "Station Platform Tunnel Canal "
    "Lighthouse"
)
_TRADES = _words(
    "baker weaver potter sailor miller painter tailor mason gardener clerk teacher doctor"
)
_GOODS = _words("clocks ropes lamps boots paper soap bricks kites glass tools carpets candles")
_COMPANY_FORMS = _words("Mills Works Brothers Foundry Traders")
_TOWN_ENDINGS = _words("ford holm wick bury stad haven")
_ONSETS = _words("b d f g h j k l m n p r s t v z br dr gr kr tr")
_VOWELS = _words("a e i o u")
_CODAS = _words("l m n r s t k")

_RELATIONS = (
    ("work", "author", "person"),
    ("person", "birthplace", "town"),
    ("company", "founder", "person"),
    ("company", "seat", "town"),
    ("town", "river", "river"),
    ("river", "source", "mountain"),
)
"""Kind of the subject, relation, kind of the object."""

MAX_WORKS = len(_ADJECTIVES) * len(_NOUNS)


@dataclass
class World:
    """Things by kind, and facts: the object of a subject's relation, which is one."""

    things: dict[str, list[str]]
    facts: dict[tuple[str, str], str] = field(default_factory=dict)

    def look_up(self, thing: str, chain: tuple[str, ...]) -> str | None:
        """Where a chain of relations leads from a thing, None if nowhere."""
        for relation in chain:
            found = self.facts.get((thing, relation))
            if found is None:
                return None
            thing = found
        return thing


def build_world(rng: random.Random, num_things: Mapping[str, int]) -> World:
    """A world with so many things of each kind, each with a name unlike every other's."""
    names = _draw_names(rng, num_things)
    world = World(names)
    for subject_kind, relation, object_kind in _RELATIONS:
        for subject in names[subject_kind]:
            world.facts[subject, relation] = rng.choice(names[object_kind])
    return world


def _draw_names(rng: random.Random, num_things: Mapping[str, int]) -> dict[str, list[str]]:
    coined = _coin_words(rng)
    # In this order, since every name is drawn: another order would be another world.
    towns = [next(coined) + rng.choice(_TOWN_ENDINGS) for _ in range(num_things["town"])]
    rivers = _take(coined, num_things["river"])
    mountains = [f"Mount {name}" for name in _take(coined, num_things["mountain"])]
    companies = []
    for _ in range(num_things["company"]):
        name = next(coined)
        companies.append(f"{name} {rng.choice(_COMPANY_FORMS)}")

    first_names = _take(coined, num_things["person"])
    last_names = _take(coined, num_things["person"])
    persons = _pair(rng, num_things["person"], first_names, last_names)
    works = [f"The {name}" for name in _pair(rng, num_things["work"], _ADJECTIVES, _NOUNS)]
    return {
        "town": towns,
        "river": rivers,
        "mountain": mountains,
        "company": companies,
        "person": persons,
        "work": works,
    }


def write_passages(rng: random.Random, world: World) -> list[tuple[str, str]]:
    """(title, text) of every thing that something is stated of.

    The sentences stand in any order, and their wording varies.
    """
    passages = []
    # Not of mountains: nothing is stated of them.
    for kind in ("work", "person", "company", "town", "river"):
        for thing in world.things[kind]:
            sentences = _state_facts(rng, world, thing)
            sentences.append(_fill(rng, rng.choice(ASIDES[kind]), thing))
            rng.shuffle(sentences)
            passages.append((thing, " ".join(map(_capitalize, sentences))))
    return passages


def _state_facts(rng: random.Random, world: World, thing: str) -> list[str]:
    """A sentence for each relation of a thing."""
    sentences = []
    for relation, wordings in STATEMENTS.items():
        found = world.facts.get((thing, relation))
        if found is not None:
            sentences.append(rng.choice(wordings).format(subject=thing, object=found))
    return sentences


def write_distractor(rng: random.Random, world: World, number: int) -> tuple[str, str]:
    """(title, text) of a passage that answers nothing, though it bears a thing's name.

    Each number gives another passage.
    """
    kind, title, sentences = DISTRACTORS[number % len(DISTRACTORS)]
    names = world.things[kind]
    name = names[number // len(DISTRACTORS) % len(names)].removeprefix("The ")
    text = " ".join(_fill(rng, sentence, name) for sentence in sentences)
    return title.format(name), text


def _fill(rng: random.Random, sentence: str, name: str) -> str:
    return sentence.format(
        name, number=rng.randint(2, 99), trade=rng.choice(_TRADES), goods=rng.choice(_GOODS)
    )


def _capitalize(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _coin_words(rng: random.Random) -> Iterator[str]:
    """Invented words, none twice. There are 77,000; `MAX_WORKS` keeps every world far below."""
    seen: set[str] = set()
    while True:
        parts = (_ONSETS, _VOWELS, _ONSETS, _VOWELS, _CODAS)
        word = "".join(map(rng.choice, parts)).capitalize()
        if word not in seen:
            seen.add(word)
            yield word


def _take(words: Iterator[str], count: int) -> list[str]:
    # Two at least, since persons' names are paired from them.
    return list(itertools.islice(words, max(2, count)))


def _pair(
    rng: random.Random, num_pairs: int, first: Sequence[str], second: Sequence[str]
) -> list[str]:
    """Different names of two words each, drawn from few words.

    Things share words that way, so a search for one finds others, too.
    """
    # Of n first and n last words n * n pairs can be made: about twice as many as are drawn.
    num_words = max(2, round((2 * num_pairs) ** 0.5) + 1)
    pairs = list(itertools.product(first[:num_words], second[:num_words]))
    return [" ".join(pair) for pair in rng.sample(pairs, num_pairs)]
