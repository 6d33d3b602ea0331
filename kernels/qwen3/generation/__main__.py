"""``python -m conformance.kernels.qwen3.generation``."""

from conformance.kernels.qwen3.generation.command import main

main()
