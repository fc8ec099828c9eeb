"""Owns the environment service: the Environment base, its sessions, its gRPC server, and the
environments shipped.
"""
