"""Tests of sdar.algorithms. Values are computed by hand or in plain loops, never by the code under
test.
"""
