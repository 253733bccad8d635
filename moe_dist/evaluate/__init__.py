"""What a model can do, in numbers: losses of held-out text, and which tokens go to which expert."""
