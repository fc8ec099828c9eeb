from __future__ import annotations

import json

import pytest

from loadtest.comparison import Comparison, Measurement, Table, Target, format_figure, take_turns
from loadtest.page import format_page, read_results, save_result, write_page

ORDER = ["first", "second"]


def compare(*pairs, target=None):
    return Comparison("ours", "theirs", "s", pairs, target)


def entry(*comparisons, tables=(), machine="a machine"):
    return {
        "date": "2026-01-02 03:04 UTC",
        "duration_s": 1.0,
        "command": "python -m loadtest.bench --only first",
        "seed": 0,
        "machine": machine,
        "measurement": Measurement(comparisons, tables, ("a note",)).to_json(),
    }


def test_the_ratio_is_the_median_of_the_pairs_ratios_not_the_ratio_of_medians():
    """The machine halves its speed for pair two; each ratio stays 0.5 but for the outlier."""
    comparison = compare((1, 2), (2, 4), (30, 6))
    assert comparison.ratios == [0.5, 0.5, 5.0]
    assert comparison.ratio == 0.5
    assert (comparison.ours, comparison.theirs) == (2, 4)


@pytest.mark.parametrize(
    ("kind", "bound", "is_met"),
    [
        ("at_least", 0.5, True),
        ("at_least", 0.51, False),
        ("at_most", 0.5, True),
        ("at_most", 0.49, False),
    ],
)
def test_a_target_is_met_on_its_own_side_of_the_bound(kind, bound, is_met):
    assert compare((1, 2), target=Target(kind, bound)).is_met is is_met


def test_without_a_target_nothing_is_met_or_missed():
    assert compare((1, 2)).is_met is None


def test_no_pairs_or_a_peer_without_a_figure_make_no_comparison():
    with pytest.raises(ValueError, match="no pair"):
        compare()
    with pytest.raises(ValueError, match="not positive"):
        compare((1, 0))


def test_both_sides_take_turns_and_the_first_pairs_do_not_count():
    calls = []

    def side(name):
        def run():
            calls.append(name)
            return float(len(calls))

        return run

    pairs = take_turns(side("ours"), side("peer"), 2, lambda text: None, num_warmups=1)
    assert calls == ["ours", "peer"] * 3
    assert pairs == ((3.0, 4.0), (5.0, 6.0))


def test_figures_keep_three_digits():
    figures = {0: "0", 0.001234: "0.00123", 12.345: "12.3", 999.6: "1,000", 12345.6: "12,346"}
    assert {value: format_figure(value) for value in figures} == figures


def test_a_measurement_survives_json():
    measurement = Measurement(
        (compare((1, 2), target=Target("at_most", 1)),), (Table("t", ("a",), (("1",),)),), ("n",)
    )
    assert Measurement.from_json(json.loads(json.dumps(measurement.to_json()))) == measurement


def test_a_row_shows_figures_ratio_range_and_whether_the_target_was_met():
    page = format_page(
        {"first": entry(compare((1, 4), (2, 4), (3, 4), target=Target("at_least", 0.85)))}
    )
    assert (
        "| ours | 2 s | theirs: 4 s | **0.5** (0.25 to 0.75, 3) | at least 0.85: **missed** |"
        in page
    )


def test_the_page_holds_tables_notes_commands_and_each_machine_once():
    table = Table("Shares", ("service", "waits"), (("rollout", "19%"),))
    page = format_page({"first": entry(tables=(table,)), "second": entry(compare((1, 2)))})
    assert "Shares\n\n| service | waits |\n| --- | --- |\n| rollout | 19% |" in page
    assert (
        "`python -m loadtest.bench --only first`, 2026-01-02 03:04 UTC, seed 0, 1 s, machine A."
        in page
    )
    assert page.count("A. a machine\n") == 1
    assert page.count("- a note") == 2


def test_measuring_again_replaces_only_its_own_rows(tmp_path):
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    save_result("second", entry(compare((1, 2))), ORDER, results, page)
    save_result("first", entry(compare((1, 4))), ORDER, results, page)
    kept = read_results(results)["second"]
    save_result("first", entry(compare((3, 4)), machine="another"), ORDER, results, page)
    assert list(read_results(results)) == ORDER
    assert read_results(results)["second"] == kept
    assert "**0.75**" in page.read_text()
    assert "**0.25**" not in page.read_text()
    assert "A. another\nB. a machine\n" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.md", "results.json"]


def test_the_page_says_whether_a_gpu_was_measured(tmp_path):
    results = tmp_path / "results.json"
    page = tmp_path / "page.md"
    gpu = tmp_path / "gpu.json"
    write_page(results, page, gpu)
    assert "Not measured: no CUDA device was at hand." in page.read_text()
    gpu.write_text(json.dumps({"command": "python loadtest/bench_gpu.py", "table": "| model |"}))
    write_page(results, page, gpu)
    assert "| model |" in page.read_text()
