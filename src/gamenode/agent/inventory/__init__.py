"""What the host is made of: one module a device, each a function of the host's files."""
