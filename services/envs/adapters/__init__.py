"""Environments that exist elsewhere, served without code: Gymnasium's, and OpenEnv servers."""
