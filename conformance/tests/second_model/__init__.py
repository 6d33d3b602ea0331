"""A second model, as a user would add one: nothing in the harness knows of it."""
