"""Owns `make chaos`: a real run under random faults, and the checks that it lost nothing (`python
-m loadtest.chaos`).
"""
