"""Known kernel faults and legal variants: what the harness itself is examined with."""
