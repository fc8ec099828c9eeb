"""What any process of a run has: settings, life and death, logs, metrics, probes, traces."""
