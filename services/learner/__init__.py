"""The learner: assembles groups, updates the policy with DeepSpeed, publishes weights and keeps
checkpoints.
"""
