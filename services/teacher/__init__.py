"""The teacher: the policy that has read a hint. Scores the sampled tokens of trajectories under a
privileged prompt.
"""
