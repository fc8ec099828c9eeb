"""`make chaos`: a real run under random faults, and the checks that it lost nothing.

Run it with `python -m loadtest.chaos`.
"""
