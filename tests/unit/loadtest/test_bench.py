from __future__ import annotations

import importlib.util

from loadtest.bench import GROUPS, MEASUREMENTS


def test_every_measurement_has_its_module():
    assert [
        name for name, module in MEASUREMENTS.items() if importlib.util.find_spec(module) is None
    ] == []


def test_a_group_names_measurements():
    assert {name for names in GROUPS.values() for name in names} <= set(MEASUREMENTS)
    assert not set(GROUPS) & set(MEASUREMENTS)
