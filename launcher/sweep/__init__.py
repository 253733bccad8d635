"""Many trainings of one run file: which, started how, and how they came out."""
