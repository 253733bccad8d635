"""What is wrong with a run, live and afterwards: rules, findings, what to do about them."""
