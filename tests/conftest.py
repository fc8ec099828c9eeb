"""Owns what holds for every test. Hypothesis times no example: how fast a machine is says nothing about the code."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
