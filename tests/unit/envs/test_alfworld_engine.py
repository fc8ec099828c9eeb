"""The kept engine says word for word what the stock engine says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from textworld.envs.pddl.pddl import PddlEnv

from services.envs.alfworld import engine
from services.envs.alfworld.engine import build_stack, translate
from services.envs.alfworld.games import GAME_FILE, SPLITS, load_entries, read_game
from services.envs.alfworld.grammar import GrammarError, compile_expression

DATA = Path(__file__).parents[3] / "examples/data/alfworld"
RESET = "reset"
TYPES_TO_COMPARE = (
    "look_at_obj_in_light",
    "pick_heat_then_place_in_recep",
    "pick_two_obj_and_place",
)


def list_games():
    return [entry for split in SPLITS for entry in load_entries(DATA)[split]]


def read(entry):
    return read_game(DATA / entry.task_id / GAME_FILE)


def find_smallest(task_type):
    return min(
        (entry for entry in list_games() if entry.task_type == task_type),
        key=lambda entry: entry.num_receptacles,
    )


def play(stack, command):
    """One line of a transcript: all that a player or a trainer can see."""
    state = stack.reset() if command == RESET else stack.step(command)[0]
    seen = (
        state["feedback"],
        tuple(state["admissible_commands"]),
        state["won"],
        state.get("score"),
        state.get("done"),
    )
    return command, *seen


def record_stock(stack, game, num_random, seed):
    """Random play with nonsense, a reset in the middle, then the expert's walkthrough."""
    rng = random.Random(seed)
    stack.load(game)
    transcript = [play(stack, RESET)]
    for _ in range(num_random):
        transcript.append(play(stack, rng.choice([*transcript[-1][2], "dance wildly", "", "Look"])))
    transcript.extend(play(stack, command) for command in [RESET, *game["walkthrough"]])
    return transcript


@pytest.fixture(scope="module")
def stock_transcripts():
    """(game, what the stock engine says) for a small game of three types; about 20 lines each."""
    stack = build_stack(PddlEnv)
    games = [read(find_smallest(task_type)) for task_type in TYPES_TO_COMPARE]
    return [
        (game, record_stock(stack, game, num_random=10, seed=seed))
        for seed, game in enumerate(games)
    ]


def test_transcripts_are_those_of_the_stock_engine_to_the_win(stock_transcripts):
    stack = build_stack()
    for game, transcript in stock_transcripts:
        stack.load(game)
        assert [play(stack, line[0]) for line in transcript] == transcript
        assert transcript[-1][3] is True


def test_games_played_in_turns_do_not_touch_each_other(stock_transcripts):
    """Two players of each game, six in one thread, the second ones some turns behind."""
    players = [
        (build_stack(), game, transcript, late)
        for game, transcript in stock_transcripts
        for late in (0, 3)
    ]
    for stack, game, _, _ in players:
        stack.load(game)
    heard = [[] for _ in players]
    for turn in range(3 + max(len(transcript) for _, transcript in stock_transcripts)):
        for number, (stack, _, transcript, late) in enumerate(players):
            if 0 <= turn - late < len(transcript):
                heard[number].append(play(stack, transcript[turn - late][0]))
    assert heard == [transcript for _, _, transcript, _ in players]


def test_an_engine_that_played_another_game_to_the_middle_plays_the_next_from_its_start(
    stock_transcripts,
):
    stack = build_stack()
    for game, transcript in [*stock_transcripts, *reversed(stock_transcripts)]:
        stack.load(game)
        assert [play(stack, line[0]) for line in transcript[:6]] == transcript[:6]


def test_transcripts_do_not_depend_on_what_is_remembered(stock_transcripts):
    """All that TextWorld interned is forgotten in the middle of a game: nothing changes."""
    stack, (game, transcript) = build_stack(), stock_transcripts[0]
    stack.load(game)
    heard = [play(stack, line[0]) for line in transcript[:5]]
    translate.cache_clear()
    engine._parse_logic.cache_clear()
    engine.mementos.core._memento_cache.clear()
    other = build_stack()
    other.load(game)
    assert play(other, RESET) == transcript[0]
    assert heard + [play(stack, line[0]) for line in transcript[5:]] == transcript


@pytest.mark.slow
def test_every_shipped_game_is_played_as_the_stock_engine_plays_it():
    stock, kept = build_stack(PddlEnv), build_stack()
    for seed, entry in enumerate(list_games()):
        game = read(entry)
        transcript = record_stock(stock, game, num_random=25, seed=seed)
        kept.load(game)
        assert [play(kept, line[0]) for line in transcript] == transcript


def test_a_loaded_game_is_translated_once_and_its_grammar_not_again():
    """Two games of other tasks and rooms: one logic, two translations, for all resets."""
    translate.cache_clear()
    engine._parse_logic.cache_clear()
    stack = build_stack()
    for entry in list_games()[:2] * 2:
        stack.load(read(entry))
        stack.reset()
        stack.reset()
    assert translate.cache_info().misses == 2
    assert engine._parse_logic.cache_info().misses == 1


def test_what_is_kept_is_bounded(monkeypatch):
    assert translate.cache_info().maxsize == 64
    assert engine._parse_logic.cache_info().maxsize == 8
    monkeypatch.setattr(engine, "_MAX_INTERNED", 10)
    stack, game = build_stack(), read(list_games()[0])
    stack.load(game)
    stack.load(game)
    # The first load interned the problem's facts; the second forgot them, and its first state came
    # from the translation.
    assert len(engine.mementos.core._memento_cache) < 100


def test_translating_leaves_the_command_line_alone(monkeypatch):
    """Fast Downward's translator sets sys.argv, from which others may read later."""
    monkeypatch.setattr("sys.argv", ["sdar", "env", "serve"])
    game = read(list_games()[0])
    translate.cache_clear()
    translate(game["pddl_domain"], game["pddl_problem"])
    assert engine.sys.argv == ["sdar", "env", "serve"]


@pytest.mark.parametrize(
    "expression", ["o.name", "o.indefinite + ' ' + o.name", "r.name or r.id", "r"]
)
def test_the_expressions_of_alfworlds_grammar_are_allowed(expression):
    assert compile_expression(expression)


@pytest.mark.parametrize(
    "expression",
    ["exit()", "o.__class__", "o._hash", "[x for x in o]", "lambda: o", "o['name']", "a:=1"],
)
def test_an_expression_that_could_do_something_is_not_compiled(expression):
    with pytest.raises((GrammarError, SyntaxError)):
        compile_expression(expression)
