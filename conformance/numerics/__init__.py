"""ULPs, arithmetics and the running error analysis of what correct kernels may return."""
