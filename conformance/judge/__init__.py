"""Verdicts: what is wrong with a run, where, and by how much."""
