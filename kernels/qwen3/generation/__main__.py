"""``python -m kernels.qwen3.generation``."""

from kernels.qwen3.generation.command import main

main()
