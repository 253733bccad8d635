"""Everything that knows that there are other ranks."""
