"""Nodes: registration, sessions, liveness."""
