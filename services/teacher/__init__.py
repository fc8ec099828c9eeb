"""The teacher service: scores the sampled tokens of trajectories under privileged prompts."""
