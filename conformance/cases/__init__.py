"""Concrete inputs that follow from short keys alone."""
