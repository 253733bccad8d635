"""From one command to N connected ranks; the only home of the command line."""
