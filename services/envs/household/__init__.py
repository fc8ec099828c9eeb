"""Owns the household: a small text game whose task types each hide a procedure that only the skill
library tells.
"""

from services.envs.household.environment import HouseholdEnvironment

__all__ = ["HouseholdEnvironment"]
