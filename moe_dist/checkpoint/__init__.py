"""State to disk."""
