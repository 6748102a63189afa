"""The operators' commands; speaks HTTP alone."""
