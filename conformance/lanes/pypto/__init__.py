"""PyPTO inside a worker process: its runtime, its compiler passes, its graphs."""
