"""Formats that cross a process: generated messages, codec, pipeline file, HTTP models, errors."""
