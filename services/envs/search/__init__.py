"""Owns Search-QA: questions answered by searching a corpus, the corpus's retriever, and a generated
world to try both on.

The environment is `services.envs.search.environment`; nothing is imported here, for the `sdar`
command reads this package too.
"""
