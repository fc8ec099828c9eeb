"""A measurement is declared once."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from sdar.process.measurements import (
    Counter,
    Declarations,
    Figure,
    Gauge,
    Histogram,
    Label,
    LabelBound,
    Meters,
    Window,
)

ROOT = Path(__file__).resolve().parents[3]
TOY = Declarations()
MARBLES = TOY.declare(
    Counter("toy_marbles_total", "marbles", "Marbles lost.", (Label("color"),), key="num_marbles")
)
WEIGHT = TOY.declare(Gauge("toy_weight_grams", "grams", "Weight.", key="weight", initial=math.nan))
THROW_SECONDS = TOY.declare(Histogram("toy_throw_seconds", "seconds", "A throw.", buckets=(1, 10)))
LUCK = TOY.declare(Figure("luck", "0 to 1", "Share of throws that hit."))


@pytest.fixture
def meters():
    return Meters(TOY)


def test_a_counter_shows_each_of_its_labels_and_reports_their_sum(meters):
    meters.count(MARBLES, color="red")
    meters.count(MARBLES, 3, color="blue")
    text = generate_latest(meters.registry).decode()
    assert "# HELP toy_marbles_total Marbles lost." in text
    assert 'toy_marbles_total{color="blue"} 3.0' in text
    assert meters.read(MARBLES) == 4
    assert meters.take_record()["num_marbles"] == 4


def test_counting_nothing_makes_the_series(meters):
    meters.count(MARBLES, 0, color="red")
    assert meters.registry.get_sample_value("toy_marbles_total", {"color": "red"}) == 0


def test_what_was_not_measured_is_left_out_of_a_record(meters):
    assert meters.take_record() == {"num_marbles": 0}
    meters.set(WEIGHT, 5)
    meters.set(LUCK, 0.5)
    assert meters.take_record() == {"num_marbles": 0, "weight": 5, "luck": 0.5}


def test_a_figure_is_not_shown_to_prometheus(meters):
    meters.set(LUCK, 0.5)
    assert b"luck" not in generate_latest(meters.registry)


def test_a_record_sets_the_gauges_that_it_has(meters):
    meters.show_record({"weight": 7.0, "num_marbles": 9.0, "other": 1.0})
    assert meters.registry.get_sample_value("toy_weight_grams") == 7
    assert meters.read(MARBLES) == 0


def test_a_histogram_has_the_buckets_of_its_declaration(meters):
    meters.observe(THROW_SECONDS, 5)
    buckets = {
        bound: meters.registry.get_sample_value("toy_throw_seconds_bucket", {"le": bound})
        for bound in ("1.0", "10.0", "+Inf")
    }
    assert buckets == {"1.0": 0, "10.0": 1, "+Inf": 1}
    assert THROW_SECONDS.series.keys() == {
        "toy_throw_seconds_bucket",
        "toy_throw_seconds_sum",
        "toy_throw_seconds_count",
    }


def test_meters_can_be_shown_in_one_more_registry(meters):
    other = CollectorRegistry()
    meters.show_in(other)
    meters.count(MARBLES, color="red")
    assert other.get_sample_value("toy_marbles_total", {"color": "red"}) == 1


def test_a_window_holds_what_was_counted_between_two_records(meters):
    now = [100.0]
    window = Window(meters, clock=lambda: now[0])
    meters.count(MARBLES, 6, color="red")
    now[0] = 103.0
    window.close()
    assert (window.growth(MARBLES), window.rate(MARBLES)) == (6, 2)
    meters.count(MARBLES, 1, color="blue")
    assert window.growth(MARBLES) == 6
    now[0] = 107.0
    window.close()
    assert (window.growth(MARBLES), window.rate(MARBLES)) == (1, 0.25)


def test_a_name_or_a_key_that_is_taken_is_refused():
    declarations = Declarations()
    declarations.declare(Gauge("toy_weight", "grams", "Weight.", key="weight"))
    with pytest.raises(ValueError, match="toy_weight is declared twice"):
        declarations.declare(Gauge("toy_weight", "grams", "Another."))
    with pytest.raises(ValueError, match="under the key weight"):
        declarations.declare(Figure("weight", "grams", "Another."))


def test_a_counter_is_named_as_prometheus_shows_it():
    with pytest.raises(ValueError, match="must be called toy_marbles_total"):
        Counter("toy_marbles", "marbles", "Marbles lost.")


def test_a_gauge_with_labels_has_no_key():
    with pytest.raises(ValueError, match="cannot hold it under one key"):
        Gauge("toy_weight", "grams", "Weight.", (Label("color"),), key="weight")


def test_a_label_that_others_name_takes_a_bounded_number_of_values():
    bound = LabelBound(2)
    assert [bound(value) for value in ("heat", "cool", "clean", "heat", "other kinds")] == [
        "heat",
        "cool",
        "other",
        "heat",
        "other",
    ]


def test_nobody_makes_a_metric_of_prometheus_past_the_declarations():
    made = re.compile(r"from prometheus_client import .*\b(Counter|Gauge|Histogram|Summary)\b")
    sources = [*(ROOT / "sdar").rglob("*.py"), *(ROOT / "services").rglob("*.py")]
    assert len(sources) > 100
    assert [str(path) for path in sources if made.search(path.read_text(encoding="utf-8"))] == []
