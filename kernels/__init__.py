"""Systems under test, beside their torch references."""
