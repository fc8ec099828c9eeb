"""The search for what a server holds, on plain functions, and the page that shows it."""

import dataclasses
import json
import math

import pytest

from loadtest.page import ROOT
from loadtest.ramp import (
    BEGIN_MARK,
    BOUND_MS,
    END_MARK,
    Ramp,
    Stage,
    climb,
    explain_limit,
    format_block,
    replace_block,
)


def build_stage(num_users, requests_per_s=None, p99_ms=10.0, num_failed=0, generator_share=0.2):
    rate = float(num_users) if requests_per_s is None else requests_per_s
    memory_bytes = 2**20 * (50 + num_users / 100)
    return Stage(
        num_users,
        rate,
        num_failed,
        1.0,
        2.0,
        p99_ms,
        generator_share,
        rate / 1000,
        rate / 5000,
        memory_bytes,
    )


@pytest.mark.parametrize("capacity", [100, 130, 256, 1500])
def test_the_largest_number_held_is_found_to_a_fifth(capacity):
    ramp = climb(
        lambda number: build_stage(number, p99_ms=10 if number <= capacity else 400),
        100,
        "it",
        "users",
        1.0,
    )
    assert ramp.best.num_users <= capacity < 1.2 * ramp.best.num_users
    assert ramp.limit == "p99 is 400 ms"
    assert ramp.best.requests_per_cpu_s == pytest.approx(1000)


def test_memory_is_what_users_add():
    ramp = climb(
        lambda number: build_stage(number, num_failed=number > 500), 100, "it", "users", 1.0
    )
    assert ramp.memory_per_100_bytes == pytest.approx(2**20)


@pytest.mark.parametrize(
    ("stage", "limit"),
    [
        (build_stage(200), ""),
        (build_stage(200, p99_ms=BOUND_MS), ""),
        (build_stage(200, p99_ms=BOUND_MS + 1), "p99"),
        (build_stage(200, num_failed=1), "1 requests failed"),
        (build_stage(200, requests_per_s=149), "no longer grows"),
        (build_stage(200, requests_per_s=151), ""),
    ],
)
def test_a_stage_is_held_only_without_failures_in_time_and_growing(stage, limit):
    told = explain_limit(stage, build_stage(100))
    assert limit in told
    assert bool(told) is bool(limit)


def test_a_full_generator_is_told_beside_the_limit():
    def try_out(number):
        return build_stage(number, p99_ms=10 if number <= 100 else 300, generator_share=0.95)

    assert climb(try_out, 100, "it", "users", 1.0).limit.endswith(
        "with the load generator at 95% of a core"
    )


def test_a_server_that_does_not_hold_the_first_stage_is_an_error():
    with pytest.raises(ValueError, match="it does not hold 100 users: 3 requests failed"):
        climb(lambda number: build_stage(number, num_failed=3), 100, "it", "users", 1.0)


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="Put both where the figures belong"):
        replace_block("# Operations\n", "new")
    found = replace_block(f"a\n{BEGIN_MARK}old\n{END_MARK}b\n", "new\n")
    assert found == f"a\n{BEGIN_MARK}new\n{END_MARK}b\n"


def test_the_figures_of_the_page_are_those_that_were_measured():
    results = json.loads((ROOT / "loadtest" / "results_outside.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert replace_block(page, format_block(results)) == page
    for ramp in map(Ramp.from_json, results["ramps"]):
        assert ramp.best.num_failed == 0
        assert ramp.best.p99_ms <= BOUND_MS
        assert math.isfinite(ramp.best.requests_per_cpu_s)


def test_a_stage_that_other_work_disturbed_is_played_again():
    """Two of three are disturbed; the third is held, so nothing is lost.

    Where all are, that is told with the limit.
    """
    tries = []

    def try_out(number):
        tries.append(number)
        is_disturbed = (number == 200 and tries.count(200) < 3) or number > 200
        stage = build_stage(number, p99_ms=900 if is_disturbed else 10)
        return dataclasses.replace(stage, others_share=1.2 if is_disturbed else 0.0)

    ramp = climb(try_out, 100, "it", "users", 1.0)
    assert ramp.best.num_users == 200
    assert tries == [100, *[200] * 3, *[400] * 3, *[283] * 3, *[238] * 3]
    assert ramp.limit == "p99 is 900 ms, with other work on 1.2 cores"
