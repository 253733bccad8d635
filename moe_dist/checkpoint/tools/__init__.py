"""What people do with checkpoints: list, inspect, cut anew, and damage on purpose."""
