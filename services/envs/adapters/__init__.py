"""Owns environments that people already have, served without code: anything Gymnasium makes, any
OpenEnv server.
"""
