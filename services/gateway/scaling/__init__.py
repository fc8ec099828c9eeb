"""How many replicas a run's workloads have: signals, hysteresis, the idle guard, and the one door
to Kubernetes.
"""
