"""Streams, leases, the account of groups and small states: one commit that is applied whole or not
at all, on Redis.
"""
