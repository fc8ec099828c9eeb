"""Makes tiny models: a tokenizer and a small Qwen2, supervised into a poor player.

`recipe` says what decides a model, `making` makes it, and one module per environment writes its
demonstrations. What comes out plays badly, and better with a skill in sight, which is what
reinforcement learning and distillation need. It never sees an evaluation task. The output is an
ordinary model directory.
"""
