"""GameNode: the control plane for a fleet of game hosts."""

__version__ = "0.1.0"
