"""The program on each game host."""
