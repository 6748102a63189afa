"""What runs steps on a host."""
