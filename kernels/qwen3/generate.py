"""``python -m kernels.qwen3.generate``: the older name of ``python -m kernels.qwen3.generation``."""

from kernels.qwen3.generation.command import main

if __name__ == "__main__":
    main()
