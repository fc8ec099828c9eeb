"""A run's streams, leases, account of groups and small states, changed by whole commits."""
