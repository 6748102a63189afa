"""Logs of steps: stored bytes and their readers."""
