"""Owns ALFWorld: household tasks in text, played by the real TextWorld engine on generated or
public games.
"""

from services.envs.alfworld.environment import AlfworldEnvironment

__all__ = ["AlfworldEnvironment"]
