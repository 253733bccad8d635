"""Build the parts, run the step, run the loop."""
