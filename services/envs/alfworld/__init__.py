"""ALFWorld: household tasks in text, generated or public, played by the real TextWorld engine."""

from services.envs.alfworld.environment import AlfworldEnvironment

__all__ = ["AlfworldEnvironment"]
