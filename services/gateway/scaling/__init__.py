"""The sizes of a run's workloads: signals, hysteresis, idle guard, and the door to Kubernetes."""
