"""Torch kernels of every stage, right and wrong: what the harness itself is examined with."""
