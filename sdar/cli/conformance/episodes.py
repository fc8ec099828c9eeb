"""The checks of whole episodes: repeatable by seed, alone in their session, ending, finite."""

from __future__ import annotations

import asyncio
import math

from sdar.cli.conformance.bench import Bench, Script, compare_scripts, difference, is_over
from sdar.cli.conformance.check import check
from sdar.cli.conformance.failure import CheckNotRun, FailedCheck, expect
from sdar.v1 import environment_pb2

MAX_TURNS_TRIED = 2000
"""Episodes that may last longer are not played to their end."""

_SEEDS = (0, 20_260_101)
_NUM_AT_ONCE = 4


@check(
    "episode.deterministic",
    "The same task, seed and texts give the same episode",
    "Draw every random number from a generator made of task and seed in OpenSession; keep clocks, "
    "global generators and "
    "orders of sets out of the answers.",
)
async def episode_deterministic(bench: Bench) -> None:
    for task in await bench.some_tasks(2):
        for seed in _SEEDS:
            first = await bench.play_prefix(task, seed)
            again = await bench.play_prefix(task, seed)
            change = compare_scripts(first, again)
            if change:
                raise FailedCheck(*change)


@check(
    "episode.interleaved",
    "Episodes that take turns, also of the same task, go as each goes alone",
    "Keep all state of an episode in its session; share only what never changes.",
)
async def episode_interleaved(bench: Bench) -> None:
    await bench.need_places(_NUM_AT_ONCE)
    one, other = await bench.some_tasks(2)
    # The same episode twice, then with another seed, then another task.
    scripts = [
        await bench.script(one, 0),
        await bench.script(one, 0),
        await bench.script(one, _SEEDS[1]),
        await bench.script(other, 0),
    ]
    opened = [await bench.open(script.task.task_id, seed=script.seed) for script in scripts]

    num_turns = max(len(script.texts) for script in scripts)
    for index in range(num_turns):
        for script, session in zip(scripts, opened, strict=True):
            if index < len(script.texts):
                answer = await bench.step(session.session_id, index, script.texts[index])
                bench.compare(script, index, answer)


@check(
    "episode.concurrent",
    "Episodes opened and played at the same time go as each goes alone",
    "Guard what sessions share; play each session's steps one at a time.",
)
async def episode_concurrent(bench: Bench) -> None:
    await bench.need_places(_NUM_AT_ONCE)
    scripts = [await bench.script(task) for task in await bench.some_tasks(_NUM_AT_ONCE)]

    async def play(script: Script) -> None:
        opened = await bench.open(script.task.task_id, seed=script.seed)
        change = difference(script.opened, opened)
        if change:
            expected, got = change
            raise FailedCheck(
                f"the opening of task {script.task.task_id!r} as it is alone: {expected}", got
            )
        await bench.replay(script, opened.session_id)

    # All to their end, so that none is being played while the sessions are closed.
    results = await asyncio.gather(*map(play, scripts), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


@check(
    "episode.ends",
    "Every episode ends within max_turns, whether it is played with possible actions or with "
    "nonsense",
    "Let an invalid action use its step, and set truncated on the answer to step max_turns - 1 at "
    "the latest.",
)
async def episode_ends(bench: Bench) -> None:
    for script in await _tour(bench):
        where = f"task {script.task.task_id!r}, texts beginning {script.texts[0]!r}"
        expect(
            script.is_over,
            f"an end within {bench.max_turns} turns ({where})",
            "neither terminated nor truncated",
        )


@check(
    "episode.one_end",
    "An episode is terminated by its own rule or truncated by a limit, never both",
    "Set truncated only where the rule has not ended the episode on the same step.",
)
async def episode_one_end(bench: Bench) -> None:
    for index, answer in await _answers(bench):
        expect(
            not (answer.terminated and answer.truncated),
            "terminated or truncated",
            f"both at step {index}",
        )


@check(
    "episode.numbers",
    "Rewards and their components are finite",
    "Check every number before it is sent: a NaN would end the training.",
)
async def episode_numbers(bench: Bench) -> None:
    for index, answer in await _answers(bench):
        numbers = {"reward": answer.reward, **answer.reward_components}
        for name, value in numbers.items():
            expect(math.isfinite(value), f"a finite {name} at step {index}", value)


@check(
    "episode.observations",
    "Every answer before the end has an observation",
    "Say at least that nothing happened: an empty observation gives the policy no prompt.",
)
async def episode_observations(bench: Bench) -> None:
    for index, answer in await _answers(bench):
        expect(
            is_over(answer) or bool(answer.observation),
            f"an observation at step {index}",
            "an empty one",
        )


async def _tour(bench: Bench) -> list[Script]:
    """Whole episodes; CheckNotRun where they may be too long to be played."""
    if bench.described.limits.max_turns > MAX_TURNS_TRIED:
        raise CheckNotRun(
            f"max_turns is {bench.described.limits.max_turns}: episodes up to {MAX_TURNS_TRIED} "
            "turns are played"
        )
    return await bench.tour()


async def _answers(bench: Bench) -> list[tuple[int, environment_pb2.StepResponse]]:
    """Every answer of these episodes with its step index."""
    answers: list[tuple[int, environment_pb2.StepResponse]] = []
    for script in await _tour(bench):
        answers.extend(enumerate(script.answers))
    return answers


CHECKS = (
    episode_deterministic,
    episode_interleaved,
    episode_concurrent,
    episode_ends,
    episode_one_end,
    episode_numbers,
    episode_observations,
)
