"""Pages about runs, and the figures in them."""
