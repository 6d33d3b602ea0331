"""``python -m conformance.kernels.qwen3.generate``: the older name of ``python -m conformance.kernels.qwen3.generation``."""

from conformance.kernels.qwen3.generation.command import main

if __name__ == "__main__":
    main()
