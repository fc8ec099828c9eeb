"""Owns what holds for every test: no example of hypothesis is timed, and Ctrl-C reaches the
processes that tests start.
"""

from __future__ import annotations

import signal

from hypothesis import settings

# How fast a machine is says nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A shell starts what it puts into the background with SIGINT ignored, and every child inherits
# that.
signal.signal(signal.SIGINT, signal.default_int_handler)
