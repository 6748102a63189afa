"""Metrics of nodes: what they report, durable before it is acknowledged."""
