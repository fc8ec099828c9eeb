"""ALFWorld: household tasks in text, played by the real TextWorld engine.

Its games are generated or public.
"""

from services.envs.alfworld.environment import AlfworldEnvironment

__all__ = ["AlfworldEnvironment"]
