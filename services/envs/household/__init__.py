"""The household: a small text game whose procedures stand only in the skill library."""

from services.envs.household.environment import HouseholdEnvironment

__all__ = ["HouseholdEnvironment"]
