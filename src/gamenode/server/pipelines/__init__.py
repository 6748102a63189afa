"""Pipelines: creation, dispatch, reports."""
