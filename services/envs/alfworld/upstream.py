"""Imports alfworld, which creates a directory when it is imported; others import it from here."""

from __future__ import annotations

import tempfile

from sdar.process.settings import apply_environment

# The directory that alfworld creates on its import, ~/.cache/alfworld without it. Nothing is
# written there.
apply_environment({"ALFWORLD_DATA": tempfile.gettempdir()})

from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos  # noqa: E402
from alfworld.gen import constants, goal_library  # noqa: E402
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH  # noqa: E402

__all__ = [
    "ALFRED_PDDL_PATH",
    "ALFRED_TWL2_PATH",
    "AlfredDemangler",
    "AlfredInfos",
    "constants",
    "goal_library",
]
