"""Prove the arithmetic: every layout against one process, and known bugs planted to show that the proof can fail."""
