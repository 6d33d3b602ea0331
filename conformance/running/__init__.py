"""Many runs of one kernel: checks, proofs of capabilities, comparisons; and the records they leave."""
