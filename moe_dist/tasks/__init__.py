"""Tasks with right answers: rows of a file, or those of lm-evaluation-harness, on one model over all ranks."""
