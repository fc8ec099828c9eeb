"""Search-QA: questions answered by searching a corpus, a retriever, and a generated world.

The environment is `services.envs.search.environment`; nothing is imported here, for the `sdar`
command reads this package too.
"""
