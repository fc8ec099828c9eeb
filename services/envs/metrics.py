"""What the environment service measures: that of every environment server."""

from __future__ import annotations

from sdar.environments.measurements import ENVIRONMENTS

__all__ = ["ENVIRONMENTS"]
