"""What every rank runs."""
