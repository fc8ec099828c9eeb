"""Every built-in environment as a user serves it, under `sdar env check` and other verbs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from sdar.cli.conformance import ALL_CHECKS
from sdar.cli.conformance.runner import find_environment
from sdar.wire.rpc_client import connect
from tests.integration.commands import SDAR, check_in_full, run_sdar, server_process
from tests.integration.test_openenv import playing_server

NEEDS_OPENENV_SERVER = "openenv"
SERVED: dict[str, tuple[str, ...]] = {
    "household": (),
    "alfworld": ("data_dir=examples/data/alfworld",),
    "webshop": ("data_dir=examples/data/webshop",),
    "search": ("data_dir=examples/data/search",),
    "gymnasium": ("id=FrozenLake-v1",),
    "openenv": (),
}


def command(name: str, options: tuple[str, ...] = ()) -> list[str]:
    flags = [flag for option in options for flag in ("--option", option)]
    return [
        *SDAR,
        "env",
        "serve",
        name,
        *flags,
        "--port",
        "0",
        "--capacity",
        "16",
        "--workers",
        "1",
    ]


async def count_sessions(address: str) -> int:
    async with connect(address) as channel:
        return (await find_environment(channel, address, "")).capacity.num_open_sessions


@pytest.mark.parametrize("name", SERVED)
async def test_a_served_environment_passes_the_conformance_suite_in_full(name: str) -> None:
    with contextlib.ExitStack() as stack:
        options = SERVED[name]
        if name == NEEDS_OPENENV_SERVER:
            options = (f"url={stack.enter_context(playing_server())[1]}",)
        async with server_process(command(name, options)) as server:
            await check_in_full(server.address)
        assert server.code == 0


async def test_an_environment_in_a_file_is_served_and_the_table_shows_every_verdict() -> None:
    async with server_process(
        command("examples/environments/guess_number.py:GuessNumber")
    ) as server:
        ended = await run_sdar("env", "check", server.address)
    assert ended.code == 0, ended.stdout
    assert all(check.check_id in ended.stdout for check in ALL_CHECKS)
    assert f"{len(ALL_CHECKS)} passed, 0 failed, 0 not run, in" in ended.stdout


async def test_a_person_plays_a_task_by_number_and_by_word() -> None:
    """place-plate-desk-cabinet lists one action at first; leaving early closes the session."""
    async with server_process(command("household")) as server:
        play = ("env", "play", server.address, "--task", "place-plate-desk-cabinet")
        ended = await run_sdar(*play, typed="1\n99\nfly\nput plate in cabinet\n")
        assert ended.code == 0, ended.stderr
        lines = ended.stdout.splitlines()
        assert lines[0] == "household, version 1: train task place-plate-desk-cabinet, seed 0"
        assert "  1  take plate" in lines
        assert any(line.startswith("No action 99: choose 1 to ") for line in lines)
        assert "This was no valid action; it used a turn." in lines
        assert lines[-1].startswith("The end after 3 turns: ")
        left = await run_sdar(*play, typed="1\n")
        assert left.code == 0
        assert left.stdout.splitlines()[-1] == "Left the game before its end."
        assert await count_sessions(server.address) == 0


async def test_what_an_environment_writes_cannot_take_over_a_terminal() -> None:
    async with server_process(command("tests.misbehaving:Misbehaving")) as server:
        ended = await run_sdar(
            "env", "play", server.address, typed="echo \x1b]0;owned\x07\x1b[2J\u202e\n"
        )
        assert ended.code == 0, ended.stderr
        assert "\\x1b]0;owned\\x07\\x1b[2J\\u202e" in ended.stdout
        assert not set(ended.stdout) & set("\x1b\x07\u202e")


async def test_what_no_keyboard_types_is_refused_and_the_game_goes_on() -> None:
    async with server_process(command("household")) as server:
        ended = await run_sdar(
            "env", "play", server.address, typed="9" * 5000 + "\n\udcff\udcfe\n1\n"
        )
        assert ended.code == 0, ended.stderr
        lines = ended.stdout.splitlines()
        assert [line for line in lines if line.startswith("No action ")]
        assert "That was no text. Write UTF-8." in lines
        assert lines[-1] == "Left the game before its end."


async def test_a_server_on_an_ipv6_address_is_found_where_it_says() -> None:
    async with server_process([*command("household"), "--host", "::ffff:127.0.0.1"]) as server:
        assert server.address.startswith("[::ffff:127.0.0.1]:")
        assert await count_sessions(server.address) == 0


async def test_ctrl_c_leaves_the_game_and_closes_its_session() -> None:
    async with server_process(command("household")) as server:
        process = await asyncio.create_subprocess_exec(
            *SDAR, "env", "play", server.address, stdin=PIPE, stdout=PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(30):
            while not (await process.stdout.readline()).startswith(b"  1  "):
                assert process.returncode is None
            assert await count_sessions(server.address) == 1
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
        assert await count_sessions(server.address) == 0


async def test_what_cannot_be_played_is_refused_in_one_sentence() -> None:
    async with server_process(command("household")) as server:
        for flags, words in (
            (("--task", "chess"), "has no task 'chess'"),
            (("--split", "chess"), "has no split 'chess'"),
            (("--environment", "chess"), "--environment 'chess' is not one of them"),
        ):
            ended = await run_sdar("env", "play", server.address, *flags)
            assert ended.code == 2
            assert words in ended.stderr
            assert len(ended.stderr.splitlines()) == 1, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("check", "127.0.0.1:1"),
            "No environment server answers at 127.0.0.1:1. Start one with `sdar env serve NAME`",
        ),
        (("play", "127.0.0.1:1"), "No environment server answers at 127.0.0.1:1."),
        (("check", "household"), "'household' is no address. Write HOST:PORT"),
        (("check", "127.0.0.1:99999"), "is no address"),
        (("serve", "chess", "--port", "0"), "'chess'"),
        (("serve", "household", "--option", "colour"), "--option takes KEY=VALUE, got 'colour'"),
        (
            ("serve", "household", "--option", "colour=[1]"),
            "--option colour is '[1]', expected a number, a text, true or false",
        ),
        (("serve", "household", "--option", "colour=blue", "--port", "0"), "colour"),
        (
            ("generate", "chess", "somewhere"),
            "'chess' is not one of 'alfworld', 'webshop', 'search'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
async def test_what_the_commands_cannot_use_ends_with_code_2(
    arguments: tuple[str, ...], words: str
) -> None:
    ended = await run_sdar("env", *arguments)
    assert ended.code == 2, ended.stderr
    assert words in " ".join(ended.stderr.replace("│", " ").split())
    assert ended.stdout == ""


async def test_an_error_is_json_where_json_is_asked_for() -> None:
    ended = await run_sdar("env", "check", "127.0.0.1:1", "--json")
    assert (ended.code, ended.told["event"], ended.told["reason"]) == (2, "error", "CONFIGURATION")


async def test_generated_data_is_served_at_once(tmp_path: Path) -> None:
    directory = tmp_path / "shop"
    ended = await run_sdar(
        "env", "generate", "webshop", str(directory), "--tasks", "20", "--seed", "3"
    )
    assert ended.code == 0, ended.stderr
    async with server_process(command("webshop", (f"data_dir={directory}",))) as server:
        played = await run_sdar("env", "play", server.address, typed="search[lamp]\n")
    assert "Page 1 (Total results: " in played.stdout
    again = await run_sdar("env", "generate", "webshop", str(directory))
    assert again.code == 2
    assert str(directory) in again.stderr
