"""Runs inside a learner pod: prints the group ids of each optimizer step of its newest checkpoint,
as one line of JSON.
"""

from __future__ import annotations

import json

from sdar.process.settings import load_settings
from services.learner.checkpoint import read_trained_groups

print(json.dumps(read_trained_groups(load_settings().checkpoints)))
