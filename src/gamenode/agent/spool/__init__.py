"""What waits on disk until the server has it."""
