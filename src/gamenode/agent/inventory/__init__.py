"""What the host is made of."""
