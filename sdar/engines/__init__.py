"""vLLM, and how a policy version gets into one that runs."""
