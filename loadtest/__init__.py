"""Measures this project against named peers in the same run.

`python -m loadtest.bench` runs everything; nothing imports it.
"""
