"""The rollout service: plays task groups against environments with the policy being trained."""
