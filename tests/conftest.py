"""What holds for every test: hypothesis has no deadline, and Ctrl-C reaches child processes."""

from __future__ import annotations

import signal

from hypothesis import settings

# How fast a machine is says nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A shell starts background jobs with SIGINT ignored, and every child inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
