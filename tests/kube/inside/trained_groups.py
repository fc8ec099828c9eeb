"""Runs inside a learner pod: prints the newest checkpoint's groups by optimizer step, as JSON."""

from __future__ import annotations

import json

from sdar.process.settings import load_settings
from services.learner.checkpoint import read_trained_groups

print(json.dumps(read_trained_groups(load_settings().checkpoints)))
