"""Many agents in one process: each is the real one, on a made-up host, with its own connection."""
