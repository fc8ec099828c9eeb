"""Stands in for wire, Redis, vLLM and worker processes where a whole run is one process."""
