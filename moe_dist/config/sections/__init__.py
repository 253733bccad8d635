"""The sections of a run file, each with what its keys must agree on."""
